// dQ with 8x8 simdgroup matrices.
//
// One threadgroup: SIMDGROUPS * ROWS consecutive queries of one head of one sequence, HEAD_CHUNK columns of dQ.
//   threads (32, SIMDGROUPS, 1); threadgroups (queries / rows, heads * chunks, sequences)
// One simdgroup: ROWS queries, in a loop over blocks of BLOCK keys that any of them sees:
//   S = Q K^T; P = exp2(S - LSE); dP = dO V^T; dS = P (dP - delta); sums += dS K; at the end dQ = scale sums
// What lives where:
//   registers    S and dP float, dS scalar, the sums float, LSE and delta of a row; Q and dO if they fit
//   threadgroup  STAGED: one block of K and one of V, for all simdgroups; OWN_IN_THREADGROUP: Q and dO, each lane its own part
//   device       Q, K, V, dO, read where they lie, whatever their strides
// Barriers, only if STAGED: one after a block was written, before anyone reads it; one after it was read, before the next
// is written. Both are reached by all simdgroups the same number of times.

// Takes a block of keys into account. EDGE: some row may not see some key of it.
template <bool EDGE>
void add_keys(Block block, int chunk, int columns, Lane lane, thread const int (&queries)[ROW_FRAGMENTS],
              thread const RowState (&states)[ROW_FRAGMENTS], Head head, Place place, constant Sizes& sizes,
              constant Factors& factors, thread const OwnedHead& own_queries, thread const OwnedValue& own_gradients,
              thread Accumulator (&sums)[ROW_FRAGMENTS][HEAD_CHUNK_FRAGMENTS]) {
    Accumulator scores[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
    multiply_rows<EDGE>(block.head, block.head_stride, block.last, lane, own_queries, scores);
#if DROPOUT
    uint4 words;
#endif
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        // What the row sees, counted from the key of this lane's first column.
        const KeyRange visible = visible_keys(queries[r], place, sizes);
        const int start = visible.start - block.first - lane.column;
        const int end = visible.end - block.first - lane.column;
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
#if DROPOUT
            const int call = r * BLOCK_FRAGMENTS + f;
            if (call % 4 == 0) {
                words = row_words<BLOCK_FRAGMENTS>(call, queries, block.first, lane, place, sizes);
            }
#endif
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const int row = 8 * f + lane.column + e;
                const int key = block.first + (EDGE ? min(row, block.last) : row);
                const float score = scores[r][f].thread_elements()[e];
                const float weight = weigh(score, states[r][0], queries[r], key, head, place, sizes, factors)[1];
                const bool is_visible = !EDGE || (8 * f + e >= start && 8 * f + e < end);
                scores[r][f].thread_elements()[e] = is_visible ? weight : 0.0f;
#if DROPOUT
                if (!is_kept(words[call % 4], e, sizes)) {
                    scores[r][f].thread_elements()[e] = mark_dropped(scores[r][f].thread_elements()[e]);
                }
#endif
            }
        }
    }
    Accumulator products[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
    multiply_rows<EDGE>(block.value, block.value_stride, block.last, lane, own_gradients, products);
    Operand weights[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const float weight = scores[r][f].thread_elements()[e];
                const float product = products[r][f].thread_elements()[e];
                weights[r][f].thread_elements()[e] = scalar(score_gradient(weight, product, states[r][1], factors));
            }
        }
    }
    add_rows<EDGE, HEAD_CHUNK_FRAGMENTS, HEAD_CHUNKS_WHOLE>(block.head + chunk_start(chunk, HEAD_CHUNK), block.head_stride,
                                                            block.last, columns, lane, weights, sums);
}

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_backward_query(
    device const scalar* q [[buffer(0)]],
    device const scalar* k [[buffer(1)]],
    device const scalar* v [[buffer(2)]],
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
    device const scalar* d_out [[buffer(9)]],
    device const RowState* row_states [[buffer(11)]],
    device scalar* d_query [[buffer(12)]],
    constant BackwardSizes& backward_sizes [[buffer(15)]],
    constant BackwardFactors& backward_factors [[buffer(16)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint3 threadgroup_count [[threadgroups_per_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
#if STAGED
    threadgroup scalar4 staged_keys[BLOCK * HEAD_PITCH];
    threadgroup scalar4 staged_values[BLOCK * VALUE_PITCH];
#endif
#if OWN_IN_THREADGROUP
    threadgroup scalar4 parked[SIMDGROUPS * ROW_FRAGMENTS * (HEAD_DEALS + VALUE_DEALS) * 64];
#endif
    constant Sizes& sizes = backward_sizes.forward;
    constant Factors& factors = backward_factors.forward;
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
    device const scalar* values = v + row_offset(sizes.v, place.batch, place.key_head, place.key_start);
    device const scalar* gradients = d_out + row_offset(backward_sizes.d_out, place.batch, place.head, place.query_start);
    const Head head = head_of(place, sizes, row_states
#if ALIBI
        , alibi_slopes
#endif
#if BIAS
        , bias
#endif
    );

    OwnedHead own_queries;
    OwnedValue own_gradients;
#if OWN_IN_THREADGROUP
    own_queries.parked = parked + int(simdgroup_index) * (ROW_FRAGMENTS * (HEAD_DEALS + VALUE_DEALS) * 64);
    own_gradients.parked = own_queries.parked + ROW_FRAGMENTS * HEAD_DEALS * 64;
#endif
    int positions[ROW_FRAGMENTS];
    RowState states[ROW_FRAGMENTS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        // Rows past the end compute the last row again and are not stored.
        const int query = min(first_query + 8 * r + lane.row, place.query_len - 1);
        own(r, queries + query * sizes.q.row, lane, own_queries);
        own(r, gradients + query * backward_sizes.d_out.row, lane, own_gradients);
        positions[r] = query;
        states[r] = head.states[query];
    }
    Accumulator sums[ROW_FRAGMENTS][HEAD_CHUNK_FRAGMENTS];
    clear_sums(sums);

    // Both ends of a row's visible keys never decrease with the row: `seen` is what some row sees, `full` what all see.
    const KeyRange first_visible = visible_keys(min(first_query, last_query), place, sizes);
    const KeyRange last_visible = visible_keys(last_query, place, sizes);
    const int seen_start = first_visible.start;
    const int seen_end = first_query < place.query_len ? last_visible.end : 0;
    const int full_start = last_visible.start;
    const int full_end = first_visible.end;
    const int chunk = place.value_chunk;
    const int columns = min(HEAD_CHUNK, HEAD_DIM - chunk * HEAD_CHUNK);

    Block block;
#if STAGED
    block.head = staged_keys;
    block.value = staged_values;
    block.head_stride = HEAD_PITCH;
    block.value_stride = VALUE_PITCH;
    const int thread_index = int(simdgroup_index) * 32 + lane.index;
    const int group_last = min(group_first + SIMDGROUPS * ROWS, place.query_len) - 1;
    const int loop_start = visible_keys(group_first, place, sizes).start;
    const int loop_end = visible_keys(group_last, place, sizes).end;
#else
    block.head_stride = sizes.k.row;
    block.value_stride = sizes.v.row;
    const int loop_start = seen_start;
    const int loop_end = seen_end;
#endif
    // Blocks start at multiples of BLOCK, so that the rounding of a row does not depend on its neighbours' mask.
    for (int first = loop_start / BLOCK * BLOCK; first < loop_end; first += BLOCK) {
        block.first = first;
        block.last = place.key_len - 1 - first;
#if STAGED
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
        stage<HEAD_CHUNKS_WHOLE, HEAD_LENGTH, HEAD_PITCH, BLOCK>(staged_keys, keys + first * sizes.k.row, sizes.k.row,
                                                                 block.last, HEAD_DIM, thread_index);
        stage<VALUE_CHUNKS_WHOLE, VALUE_LENGTH, VALUE_PITCH, BLOCK>(staged_values, values + first * sizes.v.row,
                                                                    sizes.v.row, block.last, VALUE_DIM, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // this block has been written
        if (first >= seen_end || first + BLOCK <= seen_start) {
            continue;
        }
#else
        block.head = keys + first * sizes.k.row;
        block.value = values + first * sizes.v.row;
#endif
        if (first < full_start || first + BLOCK > full_end) {
            add_keys<true>(block, chunk, columns, lane, positions, states, head, place, sizes, factors, own_queries,
                           own_gradients, sums);
        } else {
            add_keys<false>(block, chunk, columns, lane, positions, states, head, place, sizes, factors, own_queries,
                            own_gradients, sums);
        }
    }

    device scalar* results = d_query + row_offset(backward_sizes.d_query, place.batch, place.head, place.query_start)
        + chunk * HEAD_CHUNK;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        const int query = first_query + 8 * r + lane.row;
        if (query < place.query_len) {
            store_row<HEAD_CHUNK_FRAGMENTS, HEAD_CHUNKS_WHOLE>(results + query * backward_sizes.d_query.row, columns,
                                                               backward_factors.scale, lane, sums[r]);
        }
    }
}
