// Attention of a few queries: the keys of a sequence are split over threadgroups, and a threadgroup has the rows of all
// heads that share a key head, so that it reads K and V once for all of them. Rows are numbered in splits.metal.
//
// One threadgroup: one split of the keys of one key head of one sequence, VALUE_CHUNK columns of v, and
//   direct  ROWS rows; simdgroups take blocks of KEYS keys in turn, and add up what they have at the end
//   STAGED  SIMDGROUPS * ROWS rows; simdgroups have rows of their own and share blocks in threadgroup memory
//   threads (32, SIMDGROUPS, 1); threadgroups (splits * row groups, key heads * value chunks, sequences)
// One split writes out and LSE, as the forward kernel does; several write partial results for merge.metal.
// CACHED: k and v are caches, whose buffers are read here; PAGED: of pages, a multiple of KEYS rows each.
// What a simdgroup computes for a block, and what lives where, is in rows.metal. Beside that
//   threadgroup  direct: O, maximum and sum of half the simdgroups, each lane its own part
// Barriers. STAGED: one after a block was written, before anyone reads it; one after it was read, before the next is
// written. Direct: for each halving of the simdgroups, one after results were parked, before others add them; one after
// they were added, before others take their place. All are reached by all simdgroups the same number of times.

#if STAGED
constant constexpr int GROUP_ROWS = SIMDGROUPS * ROWS;
constant constexpr int TURN = KEYS;
#else
constant constexpr int GROUP_ROWS = ROWS;
// Keys of one turn of all simdgroups.
constant constexpr int TURN = SIMDGROUPS * KEYS;
// What a lane parks, in pairs of floats: two of each fragment of O, maximum and sum.
constant constexpr int PARKED_PAIRS = ROW_FRAGMENTS * (VALUE_FRAGMENTS + 1);

// Lane by lane: whoever adds this up has the same rows and columns in the same lane.
void park(threadgroup float2* parked, Lane lane, thread Rows& rows) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        threadgroup float2* row = parked + r * (VALUE_FRAGMENTS + 1) * 32 + lane.index;
        row[0] = float2(rows.maximum[r], rows.sum[r]);
#pragma clang loop unroll(full)
        for (int v = 0; v < VALUE_FRAGMENTS; ++v) {
            row[(v + 1) * 32] = float2(rows.out[r][v].thread_elements()[0], rows.out[r][v].thread_elements()[1]);
        }
    }
}

void add_parked(threadgroup const float2* parked, Lane lane, thread Rows& rows) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        threadgroup const float2* row = parked + r * (VALUE_FRAGMENTS + 1) * 32 + lane.index;
        const float2 state = row[0];
        const float maximum = max(rows.maximum[r], state[0]);
        const float own = fast::exp2(rows.maximum[r] - maximum);
        const float other = fast::exp2(state[0] - maximum);
        rows.maximum[r] = maximum;
        rows.sum[r] = fma(state[1], other, rows.sum[r] * own);
#pragma clang loop unroll(full)
        for (int v = 0; v < VALUE_FRAGMENTS; ++v) {
            const float2 values = row[(v + 1) * 32];
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                rows.out[r][v].thread_elements()[e] = fma(values[e], other, rows.out[r][v].thread_elements()[e] * own);
            }
        }
    }
}
#endif

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_decode(
    device const scalar* q [[buffer(0)]],
    device const scalar* k [[buffer(1)]],
    device const scalar* v [[buffer(2)]],
    device scalar* out [[buffer(3)]],
#if LSE
    device uint* lse [[buffer(4)]],
#endif
#if PACKED
    device const int* query_offsets [[buffer(5)]],
#endif
#if PACKED && !CACHED
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
    device float* partials [[buffer(10)]],
#if CACHED
    device const int* lengths [[buffer(11)]],
    device const int* slots [[buffer(12)]],
    device const int* left_pad [[buffer(13)]],
#endif
#if PAGED
    device const int* pages [[buffer(14)]],
#endif
    constant DecodeSizes& sizes [[buffer(15)]],
    constant Factors& factors [[buffer(16)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
#if STAGED
    threadgroup scalar4 staged_keys[KEYS * KEY_PITCH];
    threadgroup scalar4 staged_values[KEYS * VALUE_PITCH];
#elif SIMDGROUPS > 1
    threadgroup float2 parked_results[SIMDGROUPS / 2 * PARKED_PAIRS * 32];
#endif
#if QUERY_IN_THREADGROUP
    threadgroup scalar4 parked_queries[SIMDGROUPS * ROW_FRAGMENTS * HEAD_DEALS * 64];
#endif
#if PACKED && CACHED
    Place place = place_of(threadgroup_position, sizes.forward, query_offsets, query_offsets);
#elif PACKED
    Place place = place_of(threadgroup_position, sizes.forward, query_offsets, key_offsets);
#else
    Place place = place_of(threadgroup_position, sizes.forward);
#endif
    // The grid counts key heads.
    place.key_head = place.head;
#if PAGED
    const int key_block = 0;
#elif CACHED
    const int key_block = nearest_block(slot_of(place.batch, slots, sizes.cache), sizes.cache);
#else
    const int key_block = place.batch;
#endif
#if CACHED
    // Masks count keys, the first of which lies behind the padding.
    const int filled = filled_positions(place.batch, lengths, sizes.cache);
    place.key_start = sizes.cache.left_padded != 0 ? clamp(left_pad[place.batch], 0, filled) : 0;
    place.key_len = min(filled + int(sizes.cache.new_len), int(sizes.cache.capacity)) - place.key_start;
    place.diagonal = sizes.forward.top_left != 0 ? 0 : place.key_len - place.query_len;
#endif
    const int group = int(sizes.forward.group);
    const int splits = int(sizes.splits);
    const int split = int(threadgroup_position.x) % splits;
    const int row_count = counted_queries(place, sizes) * group;
    const int group_first = int(threadgroup_position.x) / splits * GROUP_ROWS;
    if (group_first >= row_count) {
        return;
    }
#if STAGED
    const int first_row = group_first + int(simdgroup_index) * ROWS;
#else
    const int first_row = group_first;
#endif

    const Lane lane = lane_of(lane_index);
    device const scalar* queries = q + row_offset(sizes.forward.q, place.batch, place.key_head * group, place.query_start);
    device const scalar* keys = k + row_offset(sizes.forward.k, key_block, place.key_head, place.key_start);
    device const scalar* values = v + row_offset(sizes.forward.v, key_block, place.key_head, place.key_start)
        + place.value_chunk * VALUE_CHUNK;
    const int columns = min(VALUE_CHUNK, VALUE_DIM - place.value_chunk * VALUE_CHUNK);

    Rows rows;
#if QUERY_IN_THREADGROUP
    threadgroup scalar4* parked = parked_queries + int(simdgroup_index) * (ROW_FRAGMENTS * HEAD_DEALS * 64);
    rows.values = parked;
#endif
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        // Rows past the end compute the last row again and are not stored.
        const int row = min(first_row + 8 * r + lane.row, row_count - 1);
        const int query = row / group;
        const int member = row % group;
        device const scalar* query_values = queries + query * sizes.forward.q.row + member * sizes.forward.q.head;
        rows.query[r] = query;
#pragma clang loop unroll(full)
        for (int f = 0; f < VALUE_FRAGMENTS; ++f) {
            rows.out[r][f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
#if QUERY_IN_THREADGROUP
        set_queries(r, query_values, factors.query, lane, parked, rows);
#else
        set_queries(r, query_values, factors.query, lane, rows);
#endif
#if ALIBI || BIAS || SINKS
        const int head = place.key_head * group + member;
#endif
#if SCORE_MODIFIED
        rows.modifiers[r].position = query + place.diagonal;
#endif
#if ALIBI
        rows.modifiers[r].slope =
            alibi_slopes[place.batch * sizes.forward.alibi_batch + head * sizes.forward.alibi_head] * LOG2_E;
#endif
#if BIAS
        rows.modifiers[r].bias = bias + place.batch * sizes.forward.bias_batch + head * sizes.forward.bias_head
            + query * sizes.forward.bias_query;
#endif
        rows.maximum[r] = LOWEST;
        rows.sum[r] = 0.0f;
#if SINKS
        // A sink counts once: for the first split, for the simdgroup whose results the others are added to, and for one
        // lane of the row.
        if (split == 0 && (STAGED || simdgroup_index == 0)) {
            const float sink = sinks[head * sizes.forward.sinks_head];
            rows.maximum[r] = sink_logit(sink);
            rows.sum[r] = lane.column == 0 ? sink_weight(sink) : 0.0f;
        }
#endif
    }

    // Both ends of a row's visible keys never decrease with the row: `seen` is what some row of the simdgroup sees, `full`
    // what all of them see.
    const int last_row = min(first_row + ROWS, row_count) - 1;
    const KeyRange first_visible = visible_keys(min(first_row, last_row) / group, place, sizes.forward);
    const KeyRange last_visible = visible_keys(last_row / group, place, sizes.forward);
    const int full_start = last_visible.start;
    const int full_end = first_visible.end;
#if STAGED
    const int seen_start = first_visible.start;
    const int seen_end = first_row < row_count ? last_visible.end : 0;
    const int group_last = min(group_first + GROUP_ROWS, row_count) - 1;
    const int all_start = visible_keys(group_first / group, place, sizes.forward).start / KEYS * KEYS;
    const int all_end = visible_keys(group_last / group, place, sizes.forward).end;
#else
    const int all_start = first_visible.start / KEYS * KEYS;
    const int all_end = last_visible.end;
#endif
    // Splits are whole turns, and start where blocks do: rounding does not depend on the neighbours of a row.
    const int turns = (max(all_end - all_start, 0) + TURN - 1) / TURN;
    const int split_turns = (turns + splits - 1) / splits;
    const int start = all_start + min(split * split_turns, turns) * TURN;
    const int end = min(all_start + min((split + 1) * split_turns, turns) * TURN, all_end);

    Block block;
#if STAGED
    block.keys = staged_keys;
    block.values = staged_values;
    block.key_stride = KEY_PITCH;
    block.value_stride = VALUE_PITCH;
    const int thread_index = int(simdgroup_index) * 32 + lane.index;
    for (int first = start; first < end; first += KEYS) {
#else
    block.key_stride = sizes.forward.k.row;
    block.value_stride = sizes.forward.v.row;
    for (int first = start + int(simdgroup_index) * KEYS; first < end; first += TURN) {
#endif
        block.first = first;
        block.last = place.key_len - 1 - first;
#if PAGED
        // Pages are whole blocks.
        const long page = nearest_block(page_of(place.batch, first, pages, sizes.cache), sizes.cache);
        const long row = first % int(sizes.cache.block_len);
        device const scalar* block_keys = keys + page * sizes.forward.k.batch + row * sizes.forward.k.row;
        device const scalar* block_values = values + page * sizes.forward.v.batch + row * sizes.forward.v.row;
#else
        device const scalar* block_keys = keys + first * sizes.forward.k.row;
        device const scalar* block_values = values + first * sizes.forward.v.row;
#endif
#if STAGED
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
        stage<HEAD_WHOLE, 2 * HEAD_FRAGMENTS, KEY_PITCH, KEYS>(staged_keys, block_keys, sizes.forward.k.row, block.last,
                                                               HEAD_DIM, thread_index);
        stage<VALUE_WHOLE, 2 * VALUE_FRAGMENTS, VALUE_PITCH, KEYS>(staged_values, block_values, sizes.forward.v.row,
                                                                   block.last, columns, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // this block has been written
        if (first >= seen_end || first + KEYS <= seen_start) {
            continue;
        }
#else
        block.keys = block_keys;
        block.values = block_values;
#endif
        if (first < full_start || first + KEYS > full_end) {
            add_block<true>(block, columns, lane, place, sizes.forward, factors, rows);
        } else {
            add_block<false>(block, columns, lane, place, sizes.forward, factors, rows);
        }
    }

#if !STAGED && SIMDGROUPS > 1
    for (int half = SIMDGROUPS / 2; half > 0; half /= 2) {
        const int slot = int(simdgroup_index) % half;
        threadgroup float2* parked_there = parked_results + slot * (PARKED_PAIRS * 32);
        if (int(simdgroup_index) >= half && int(simdgroup_index) < 2 * half) {
            park(parked_there, lane, rows);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // half of the results have been parked
        if (int(simdgroup_index) < half) {
            add_parked(parked_there, lane, rows);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // they have been added
    }
    if (simdgroup_index > 0) {
        return;
    }
#endif

    device SplitState* states = (device SplitState*)partials;
    device float* partial_values = partials + sizes.splits * state_count(sizes) * 2;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        float sum = rows.sum[r];
        sum += simd_shuffle_xor(sum, 1);
        sum += simd_shuffle_xor(sum, 8);
        const int row = first_row + 8 * r + lane.row;
        if (row >= row_count) {
            continue;
        }
        const int query = row / group;
        const int head = place.key_head * group + row % group;
        if (splits > 1) {
            const long at = split * state_count(sizes) + state_at(place, query, head, sizes);
            device float* partial = partial_values + at * VALUE_DIM + place.value_chunk * VALUE_CHUNK;
            if (place.value_chunk == 0 && lane.column == 0) {
                states[at] = SplitState(rows.maximum[r], sum);
            }
            if (sum != 0.0f) {
                store_columns(partial, r, 1.0f, columns, lane, rows);
            }
            continue;
        }
        const float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
        device scalar* result = out + row_offset(sizes.forward.out, place.batch, head, place.query_start + query)
            + place.value_chunk * VALUE_CHUNK;
        store_columns(result, r, normalizer, columns, lane, rows);
#if LSE
        if (place.value_chunk == 0 && lane.column == 0) {
            lse[place.batch * sizes.forward.lse_batch + head * sizes.forward.lse_head + place.query_start + query] =
                lse_bits(rows.maximum[r], sum);
        }
#endif
    }
}
