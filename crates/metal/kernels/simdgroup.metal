// Attention forward with 8x8 simdgroup matrices: S, P, O and the softmax state never leave the registers.
//
// One threadgroup: SIMDGROUPS * ROWS consecutive queries of one head of one sequence, VALUE_CHUNK columns of v.
//   threads (32, SIMDGROUPS, 1); threadgroups (queries / rows, heads * value chunks, sequences)
// One simdgroup: ROWS consecutive queries, in a loop over the blocks of KEYS keys that any of them sees; what it computes for
// a block, and what lives where, is in rows.metal.
// Barriers, only if STAGED: one after a block was written, before anyone reads it; one after it was read, before the next
// is written. Both are reached by all simdgroups the same number of times.

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_simdgroup(
    device const scalar* q [[buffer(0)]],
    device const scalar* k [[buffer(1)]],
    device const scalar* v [[buffer(2)]],
    device scalar* out [[buffer(3)]],
#if LSE
    device uint* lse [[buffer(4)]],
#endif
#if PACKED
    device const int* query_offsets [[buffer(5)]],
    device const int* key_offsets [[buffer(6)]],
#endif
#if ALIBI
    device const float* alibi_slopes [[buffer(7)]],
#endif
#if BIAS
    device const bias_scalar* bias [[buffer(8)]],
#endif
#if SINKS
    device const float* sinks [[buffer(9)]],
#endif
    constant Sizes& sizes [[buffer(10)]],
    constant Factors& factors [[buffer(11)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint3 threadgroup_count [[threadgroups_per_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
#if STAGED
    threadgroup scalar4 staged_keys[KEYS * KEY_PITCH];
    threadgroup scalar4 staged_values[KEYS * VALUE_PITCH];
#endif
#if QUERY_IN_THREADGROUP
    threadgroup scalar4 parked_queries[SIMDGROUPS * ROW_FRAGMENTS * HEAD_DEALS * 64];
#endif
#if PACKED
    const Place place = place_of(threadgroup_position, sizes, query_offsets, key_offsets);
#else
    const Place place = place_of(threadgroup_position, sizes);
#endif
#if WINDOW_RIGHT
    // Later queries see more keys: the longest work first leaves no long tail at the end of the grid.
    const int row_group = int(threadgroup_count.x - 1 - threadgroup_position.x);
#else
    const int row_group = int(threadgroup_position.x);
#endif
    const int group_first = row_group * (SIMDGROUPS * ROWS);
    const int first_query = group_first + int(simdgroup_index) * ROWS;
#if STAGED
    if (group_first >= place.query_len) {
        return;
    }
#else
    if (first_query >= place.query_len) {
        return;
    }
#endif
    const int last_query = min(first_query + ROWS, place.query_len) - 1;

    const Lane lane = lane_of(lane_index);

    device const scalar* queries = q + row_offset(sizes.q, place.batch, place.head, place.query_start);
    device const scalar* keys = k + row_offset(sizes.k, place.batch, place.key_head, place.key_start);
    device const scalar* values = v + row_offset(sizes.v, place.batch, place.key_head, place.key_start)
        + place.value_chunk * VALUE_CHUNK;
    const int columns = min(VALUE_CHUNK, VALUE_DIM - place.value_chunk * VALUE_CHUNK);

#if ALIBI
    const float slope = alibi_slopes[place.batch * sizes.alibi_batch + place.head * sizes.alibi_head] * LOG2_E;
#endif
#if SINKS
    const float sink = sinks[place.head * sizes.sinks_head];
#endif
    Rows rows;
#if QUERY_IN_THREADGROUP
    threadgroup scalar4* parked = parked_queries + int(simdgroup_index) * (ROW_FRAGMENTS * HEAD_DEALS * 64);
    rows.values = parked;
#endif
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        // Rows past the end compute the last row again and are not stored.
        const int query = min(first_query + 8 * r + lane.row, place.query_len - 1);
        device const scalar* row = queries + query * sizes.q.row;
        rows.query[r] = query;
#pragma clang loop unroll(full)
        for (int v = 0; v < VALUE_FRAGMENTS; ++v) {
            rows.out[r][v] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
#if QUERY_IN_THREADGROUP
        set_queries(r, row, factors.query, lane, parked, rows);
#else
        set_queries(r, row, factors.query, lane, rows);
#endif
#if SCORE_MODIFIED
        rows.modifiers[r].position = query + place.diagonal;
#endif
#if ALIBI
        rows.modifiers[r].slope = slope;
#endif
#if BIAS
        rows.modifiers[r].bias =
            bias + place.batch * sizes.bias_batch + place.head * sizes.bias_head + query * sizes.bias_query;
#endif
#if SINKS
        rows.maximum[r] = sink_logit(sink);
        // Sums of a row are added up at the end, and the sink counts once.
        rows.sum[r] = lane.column == 0 ? sink_weight(sink) : 0.0f;
#else
        rows.maximum[r] = LOWEST;
        rows.sum[r] = 0.0f;
#endif
    }

    // Both ends of a row's visible keys never decrease with the row: `seen` is what some row sees, `full` what all see.
    const KeyRange first_visible = visible_keys(min(first_query, last_query), place, sizes);
    const KeyRange last_visible = visible_keys(last_query, place, sizes);
    const int seen_start = first_visible.start;
    const int seen_end = first_query < place.query_len ? last_visible.end : 0;
    const int full_start = last_visible.start;
    const int full_end = first_visible.end;

    Block block;
#if STAGED
    block.keys = staged_keys;
    block.values = staged_values;
    const int thread_index = int(simdgroup_index) * 32 + lane.index;
    block.key_stride = KEY_PITCH;
    block.value_stride = VALUE_PITCH;
    const int group_last = min(group_first + SIMDGROUPS * ROWS, place.query_len) - 1;
    const int loop_start = visible_keys(group_first, place, sizes).start;
    const int loop_end = visible_keys(group_last, place, sizes).end;
#else
    block.key_stride = sizes.k.row;
    block.value_stride = sizes.v.row;
    const int loop_start = seen_start;
    const int loop_end = seen_end;
#endif
    // Blocks start at multiples of KEYS, so that the rounding of a row does not depend on its neighbours' mask.
    for (int first = loop_start / KEYS * KEYS; first < loop_end; first += KEYS) {
        block.first = first;
        block.last = place.key_len - 1 - first;
#if STAGED
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
        stage<HEAD_WHOLE, 2 * HEAD_FRAGMENTS, KEY_PITCH, KEYS>(staged_keys, keys + first * sizes.k.row, sizes.k.row, block.last,
                                                         HEAD_DIM, thread_index);
        stage<VALUE_WHOLE, 2 * VALUE_FRAGMENTS, VALUE_PITCH, KEYS>(staged_values, values + first * sizes.v.row, sizes.v.row,
                                                             block.last, columns, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // this block has been written
        if (first >= seen_end || first + KEYS <= seen_start) {
            continue;
        }
#else
        block.keys = keys + first * sizes.k.row;
        block.values = values + first * sizes.v.row;
#endif
        if (first < full_start || first + KEYS > full_end) {
            add_block<true>(block, columns, lane, place, sizes, factors, rows);
        } else {
            add_block<false>(block, columns, lane, place, sizes, factors, rows);
        }
    }

    device scalar* results = out + row_offset(sizes.out, place.batch, place.head, place.query_start)
        + place.value_chunk * VALUE_CHUNK;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        float sum = rows.sum[r];
        sum += simd_shuffle_xor(sum, 1);
        sum += simd_shuffle_xor(sum, 8);
        const int query = first_query + 8 * r + lane.row;
        if (query < place.query_len) {
            float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
#if DROPOUT
            normalizer *= factors.kept;
#endif
            store_columns(results + query * sizes.out.row, r, normalizer, columns, lane, rows);
#if LSE
            if (place.value_chunk == 0 && lane.column == 0) {
                lse[place.batch * sizes.lse_batch + place.head * sizes.lse_head + place.query_start + query] =
                    lse_bits(rows.maximum[r], sum);
            }
#endif
        }
    }
}
