// Before attention over a cache: new keys and values are written into it; ROTARY: new keys and queries are rotated by
// their positions (Su et al., 2021, arXiv 2104.09864).
//
// One threadgroup: SIMDGROUPS rows (a token and a head) of one tensor of one sequence, one a simdgroup; lanes share columns.
//   threads (32, SIMDGROUPS, 1); threadgroups (rows / SIMDGROUPS, tensors: new keys, new values, queries, sequences)
//   pair (x, y) at position n: (x cos_n - y sin_n, x sin_n + y cos_n), float32, rounded once; other columns are copied
// Everything lives in registers; no barriers. Where lengths, slots or pages lie is in cache.metal. Nothing is written where
// a slot or page is none of the cache's.

// The int64 list of a launch, in the order of append.rs.
struct AppendSizes {
    CacheSizes cache;
    long query_len;        // of a packed batch: of its longest sequence
    long query_rows;       // of all sequences
    long query_heads;
    long key_heads;
    long head_dim;
    long value_dim;
    long rotary_dim;       // columns that are rotated
    long neighbours;       // 1: pairs are columns 2 p and 2 p + 1; 0: p and p + rotary_dim / 2
    long positions;        // rows of cos and sin
    long cos_row;
    long sin_row;
    long queries_advance;  // 1: query i stands at position filled + i; 0: all stand at position filled
    Strides q;
    Strides rotated;
    Strides new_keys;
    Strides new_values;
    Strides key_cache;
    Strides value_cache;
};

#if ROTARY
// Writes row `from`, rotated as at `position`, to `to`.
void rotate_row(device const scalar* from, device scalar* to, long position, device const scalar* cosines,
                device const scalar* sines, int lane, constant AppendSizes& sizes) {
    const long at = min(position, sizes.positions - 1);
    device const scalar* cosine = cosines + at * sizes.cos_row;
    device const scalar* sine = sines + at * sizes.sin_row;
    const int pairs = int(sizes.rotary_dim) / 2;
    for (int pair = lane; pair < pairs; pair += 32) {
        const int first = sizes.neighbours != 0 ? 2 * pair : pair;
        const int second = sizes.neighbours != 0 ? first + 1 : pair + pairs;
        const float x = float(from[first]);
        const float y = float(from[second]);
        const float c = float(cosine[pair]);
        const float s = float(sine[pair]);
        to[first] = scalar(fma(x, c, -(y * s)));
        to[second] = scalar(fma(x, s, y * c));
    }
    for (int column = int(sizes.rotary_dim) + lane; column < int(sizes.head_dim); column += 32) {
        to[column] = from[column];
    }
}
#endif

kernel void attention_append(
#if ROTARY
    device const scalar* q [[buffer(0)]],
#endif
    device const scalar* new_keys [[buffer(1)]],
    device const scalar* new_values [[buffer(2)]],
    device scalar* key_cache [[buffer(3)]],
    device scalar* value_cache [[buffer(4)]],
#if ROTARY && PACKED
    device const int* query_offsets [[buffer(5)]],
#endif
#if ROTARY
    device const scalar* cosines [[buffer(6)]],
    device const scalar* sines [[buffer(7)]],
    device scalar* rotated [[buffer(8)]],
#endif
    device const int* lengths [[buffer(9)]],
#if PAGED
    device const int* pages [[buffer(10)]],
#else
    device const int* slots [[buffer(11)]],
#endif
    constant AppendSizes& sizes [[buffer(12)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
    const int sequence = int(threadgroup_position.z);
    const int row = int(threadgroup_position.x) * SIMDGROUPS + int(simdgroup_index);
    const int lane = int(lane_index);
    const int filled = filled_positions(sequence, lengths, sizes.cache);
#if ROTARY
    if (threadgroup_position.y == 2) {
        const int heads = int(sizes.query_heads);
        const int query = row / heads;
        const int head = row % heads;
#if PACKED
        // Nobody has looked at the offsets: what they claim beyond the tensor is cut off.
        const int start = clamp(query_offsets[sequence], 0, int(sizes.query_rows));
        const int end = clamp(query_offsets[sequence + 1], start, int(sizes.query_rows));
        const int query_len = min(end - start, int(sizes.query_len));
#else
        const int start = 0;
        const int query_len = int(sizes.query_len);
#endif
        if (query < query_len) {
            const long position = long(filled) + (sizes.queries_advance != 0 ? query : 0);
            rotate_row(q + row_offset(sizes.q, sequence, head, long(start) + query),
                       rotated + row_offset(sizes.rotated, sequence, head, long(start) + query),
                       position, cosines, sines, lane, sizes);
        }
        return;
    }
#endif
    const int heads = int(sizes.key_heads);
    const int token = row / heads;
    const int head = row % heads;
    if (token >= int(sizes.cache.new_len) || token >= int(sizes.cache.capacity)) {
        return;
    }
    const int position = filled + token;
#if PAGED
    const int block = page_of(sequence, position, pages, sizes.cache);
    const int place = position % int(sizes.cache.block_len);
#else
    const int block = slot_of(sequence, slots, sizes.cache);
    const int place = position;
#endif
    if (!is_block(block, sizes.cache)) {
        return;
    }
    if (threadgroup_position.y == 0) {
        device const scalar* from = new_keys + row_offset(sizes.new_keys, sequence, head, token);
        device scalar* to = key_cache + row_offset(sizes.key_cache, block, head, place);
#if ROTARY
        rotate_row(from, to, position, cosines, sines, lane, sizes);
#else
        for (int column = lane; column < int(sizes.head_dim); column += 32) {
            to[column] = from[column];
        }
#endif
    } else {
        device const scalar* from = new_values + row_offset(sizes.new_values, sequence, head, token);
        device scalar* to = value_cache + row_offset(sizes.value_cache, block, head, place);
        for (int column = lane; column < int(sizes.value_dim); column += 32) {
            to[column] = from[column];
        }
    }
}
