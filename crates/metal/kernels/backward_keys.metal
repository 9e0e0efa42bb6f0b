// dK, dV or both with 8x8 simdgroup matrices.
//
// One threadgroup: SIMDGROUPS * ROWS consecutive keys of one key head of one sequence; HEAD_CHUNK columns of dK if
// KEY_GRADIENT, VALUE_CHUNK columns of dV if VALUE_GRADIENT.
//   threads (32, SIMDGROUPS, 1); threadgroups (keys / rows, key heads * chunks, sequences)
// One simdgroup: ROWS keys, in a loop over the query heads that share the key head, and over blocks of BLOCK queries that
// see any of the keys:
//   S^T = K Q^T; P^T = exp2(S^T - LSE); dV += P^T dO
//   dP^T = V dO^T; dS^T = P^T (dP^T - delta); sums += dS^T Q; at the end dK = scale sums
// What lives where:
//   registers    S^T and dP^T float, P^T and dS^T scalar, the sums float; K and V if they fit
//   threadgroup  STAGED: one block of Q and one of dO, for all simdgroups; OWN_IN_THREADGROUP: K and V, each lane its own part
//   device       Q, K, V, dO, LSE and delta, read where they lie, whatever their strides
// Barriers, only if STAGED: one after a block was written, before anyone reads it; one after it was read, before the next
// is written. Both are reached by all simdgroups the same number of times.

// Queries start <= i < end.
struct QueryRange {
    int start;
    int end;
};

// Those that see a key: visible_keys() turned round. Both ends never decrease with the key.
QueryRange seeing_queries(int key, Place place, constant Sizes& sizes) {
    QueryRange range = {0, place.query_len};
#if WINDOW_RIGHT
    range.start = clamp(key - place.diagonal - int(sizes.window_right), 0, place.query_len);
#endif
#if WINDOW_LEFT
    range.end = clamp(key - place.diagonal + int(sizes.window_left) + 1, range.start, place.query_len);
#endif
    return range;
}

// What a simdgroup sums for its keys.
struct Sums {
#if KEY_GRADIENT
    Accumulator keys[ROW_FRAGMENTS][HEAD_CHUNK_FRAGMENTS];
#endif
#if VALUE_GRADIENT
    Accumulator values[ROW_FRAGMENTS][VALUE_CHUNK_FRAGMENTS];
#endif
};

// The keys of a simdgroup.
struct Own {
    OwnedHead keys;
#if KEY_GRADIENT
    OwnedValue values;
#endif
    int position[ROW_FRAGMENTS];
};

#if DROPOUT
// Random words of the queries in both columns of a lane, which decide about the key of its row: of fragment `first`, counted
// row by row, and of the up to three behind it. The calls are those of a group of keys for each query, and all 8 lanes of a
// column need them: two neighbours make those of their two columns.
template <bool EDGE>
void column_words(int first, thread const int (&keys)[ROW_FRAGMENTS], Block block, Lane lane, Place place,
                  constant Sizes& sizes, thread uint4 (&words)[2]) {
    const int calls = min(4, ROW_FRAGMENTS * BLOCK_FRAGMENTS - first);
    const int call = first + own_call(lane.row / 2, calls);
    const bool is_odd = lane.row % 2 != 0;
    const int row = 8 * (call % BLOCK_FRAGMENTS) + lane.column + (is_odd ? 1 : 0);
    const int query = block.first + (EDGE ? min(row, block.last) : row);
    const int group = value_at(keys, call / BLOCK_FRAGMENTS) / 8;
    const uint4 own = own_words(random_words(query, group, place, sizes), lane.row / 2, 4, 16, calls);
    const uint4 other = simd_shuffle_xor(own, 2);
    words[0] = is_odd ? other : own;
    words[1] = is_odd ? own : other;
}
#endif

// Takes a block of queries into account. EDGE: some query may not see some key.
template <bool EDGE>
void add_queries(Block block, int chunk, Lane lane, Head head, Place place, constant Sizes& sizes,
                 constant Factors& factors, thread const Own& own, thread Sums& sums) {
    RowState states[BLOCK_FRAGMENTS][2];
#pragma clang loop unroll(full)
    for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
#pragma clang loop unroll(full)
        for (int e = 0; e < 2; ++e) {
            const int row = 8 * f + lane.column + e;
            states[f][e] = head.states[block.first + (EDGE ? min(row, block.last) : row)];
        }
    }
    Accumulator scores[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
    multiply_rows<EDGE>(block.head, block.head_stride, block.last, lane, own.keys, scores);
#if VALUE_GRADIENT
    Operand weights[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
#endif
#if DROPOUT
    uint4 words[2];
#endif
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        // What sees the key, counted from the query of this lane's first column.
        const QueryRange seeing = seeing_queries(own.position[r], place, sizes);
        const int start = seeing.start - block.first - lane.column;
        const int end = seeing.end - block.first - lane.column;
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
#if DROPOUT
            const int call = r * BLOCK_FRAGMENTS + f;
            if (call % 4 == 0) {
                column_words<EDGE>(call, own.position, block, lane, place, sizes, words);
            }
#endif
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const int row = 8 * f + lane.column + e;
                const int query = block.first + (EDGE ? min(row, block.last) : row);
                const float score = scores[r][f].thread_elements()[e];
                const float2 weight = weigh(score, states[f][e][0], query, own.position[r], head, place, sizes, factors);
                const bool is_visible = !EDGE || (8 * f + e >= start && 8 * f + e < end);
                scores[r][f].thread_elements()[e] = is_visible ? weight[1] : 0.0f;
#if DROPOUT
                const bool kept = is_kept(words[e][call % 4], lane.row, sizes);
                if (!kept) {
                    scores[r][f].thread_elements()[e] = mark_dropped(scores[r][f].thread_elements()[e]);
                }
#else
                const bool kept = true;
#endif
#if VALUE_GRADIENT
                weights[r][f].thread_elements()[e] = scalar(is_visible && kept ? weight[0] : 0.0f);
#endif
            }
        }
    }
#if VALUE_GRADIENT
    const int value_columns = min(VALUE_CHUNK, VALUE_DIM - chunk * VALUE_CHUNK);
    add_rows<EDGE, VALUE_CHUNK_FRAGMENTS, VALUE_CHUNKS_WHOLE>(block.value + chunk_start(chunk, VALUE_CHUNK),
                                                              block.value_stride, block.last, value_columns, lane,
                                                              weights, sums.values);
#endif
#if KEY_GRADIENT
    Accumulator products[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
    multiply_rows<EDGE>(block.value, block.value_stride, block.last, lane, own.values, products);
    Operand differences[ROW_FRAGMENTS][BLOCK_FRAGMENTS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const float weight = scores[r][f].thread_elements()[e];
                const float product = products[r][f].thread_elements()[e];
                differences[r][f].thread_elements()[e] = scalar(score_gradient(weight, product, states[f][e][1], factors));
            }
        }
    }
    const int key_columns = min(HEAD_CHUNK, HEAD_DIM - chunk * HEAD_CHUNK);
    add_rows<EDGE, HEAD_CHUNK_FRAGMENTS, HEAD_CHUNKS_WHOLE>(block.head + chunk_start(chunk, HEAD_CHUNK),
                                                            block.head_stride, block.last, key_columns, lane,
                                                            differences, sums.keys);
#endif
}

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_backward_keys(
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
#if KEY_GRADIENT
    device scalar* d_key [[buffer(13)]],
#endif
#if VALUE_GRADIENT
    device scalar* d_value [[buffer(14)]],
#endif
    constant BackwardSizes& backward_sizes [[buffer(15)]],
    constant BackwardFactors& backward_factors [[buffer(16)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
#if STAGED
    threadgroup scalar4 staged_queries[BLOCK * HEAD_PITCH];
    threadgroup scalar4 staged_gradients[BLOCK * VALUE_PITCH];
#endif
#if OWN_IN_THREADGROUP
    threadgroup scalar4 parked[SIMDGROUPS * ROW_FRAGMENTS * (HEAD_DEALS + KEY_GRADIENT * VALUE_DEALS) * 64];
#endif
    constant Sizes& sizes = backward_sizes.forward;
    constant Factors& factors = backward_factors.forward;
#if PACKED
    Place place = place_of(threadgroup_position, sizes, query_offsets, key_offsets);
#else
    Place place = place_of(threadgroup_position, sizes);
#endif
    place.key_head = place.head;
    // Earlier keys are seen by more queries, and come first in the grid.
    const int group_first = int(threadgroup_position.x) * (SIMDGROUPS * ROWS);
    const int first_key = group_first + int(simdgroup_index) * ROWS;
#if STAGED
    if (group_first >= place.key_len) {
        return;
    }
#else
    if (first_key >= place.key_len) {
        return;
    }
#endif
    const int last_key = min(first_key + ROWS, place.key_len) - 1;
    const Lane lane = lane_of(lane_index);
    const int chunk = place.value_chunk;

    device const scalar* keys = k + row_offset(sizes.k, place.batch, place.key_head, place.key_start);
    device const scalar* values = v + row_offset(sizes.v, place.batch, place.key_head, place.key_start);
    Own own_keys;
#if OWN_IN_THREADGROUP
    own_keys.keys.parked = parked + int(simdgroup_index) * (ROW_FRAGMENTS * (HEAD_DEALS + KEY_GRADIENT * VALUE_DEALS) * 64);
#if KEY_GRADIENT
    own_keys.values.parked = own_keys.keys.parked + ROW_FRAGMENTS * HEAD_DEALS * 64;
#endif
#endif
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        // Rows past the end compute the last row again and are not stored.
        const int key = min(first_key + 8 * r + lane.row, place.key_len - 1);
        own(r, keys + key * sizes.k.row, lane, own_keys.keys);
#if KEY_GRADIENT
        own(r, values + key * sizes.v.row, lane, own_keys.values);
#endif
        own_keys.position[r] = key;
    }
    Sums sums;
#if KEY_GRADIENT
    clear_sums(sums.keys);
#endif
#if VALUE_GRADIENT
    clear_sums(sums.values);
#endif

    // Both ends of what sees a key never decrease with the key: `seeing` is what sees some key, `full` what sees all.
    const QueryRange first_seeing = seeing_queries(min(first_key, last_key), place, sizes);
    const QueryRange last_seeing = seeing_queries(last_key, place, sizes);
    const int seeing_start = first_seeing.start;
    const int seeing_end = first_key < place.key_len ? last_seeing.end : 0;
    const int full_start = last_seeing.start;
    const int full_end = first_seeing.end;

    Block block;
#if STAGED
    block.head = staged_queries;
    block.value = staged_gradients;
    block.head_stride = HEAD_PITCH;
    block.value_stride = VALUE_PITCH;
    const int thread_index = int(simdgroup_index) * 32 + lane.index;
    const int group_last = min(group_first + SIMDGROUPS * ROWS, place.key_len) - 1;
    const int loop_start = seeing_queries(group_first, place, sizes).start;
    const int loop_end = seeing_queries(group_last, place, sizes).end;
#else
    block.head_stride = sizes.q.row;
    block.value_stride = backward_sizes.d_out.row;
    const int loop_start = seeing_start;
    const int loop_end = seeing_end;
#endif
    for (int member = 0; member < int(sizes.group); ++member) {
        place.head = place.key_head * int(sizes.group) + member;
        const Head head = head_of(place, sizes, row_states
#if ALIBI
            , alibi_slopes
#endif
#if BIAS
            , bias
#endif
        );
        device const scalar* queries = q + row_offset(sizes.q, place.batch, place.head, place.query_start);
        device const scalar* gradients =
            d_out + row_offset(backward_sizes.d_out, place.batch, place.head, place.query_start);
        // Blocks start at multiples of BLOCK, so that the rounding of a row does not depend on its neighbours' mask.
        for (int first = loop_start / BLOCK * BLOCK; first < loop_end; first += BLOCK) {
            block.first = first;
            block.last = place.query_len - 1 - first;
#if STAGED
            threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
            stage<HEAD_CHUNKS_WHOLE, HEAD_LENGTH, HEAD_PITCH, BLOCK>(staged_queries, queries + first * sizes.q.row,
                                                                     sizes.q.row, block.last, HEAD_DIM, thread_index);
            stage<VALUE_CHUNKS_WHOLE, VALUE_LENGTH, VALUE_PITCH, BLOCK>(
                staged_gradients, gradients + first * backward_sizes.d_out.row, backward_sizes.d_out.row, block.last,
                VALUE_DIM, thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);  // this block has been written
            if (first >= seeing_end || first + BLOCK <= seeing_start) {
                continue;
            }
#else
            block.head = queries + first * sizes.q.row;
            block.value = gradients + first * backward_sizes.d_out.row;
#endif
            if (first < full_start || first + BLOCK > full_end) {
                add_queries<true>(block, chunk, lane, head, place, sizes, factors, own_keys, sums);
            } else {
                add_queries<false>(block, chunk, lane, head, place, sizes, factors, own_keys, sums);
            }
        }
    }

#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        const int key = first_key + 8 * r + lane.row;
        if (key < place.key_len) {
#if KEY_GRADIENT
            device scalar* key_row = d_key + row_offset(backward_sizes.d_key, place.batch, place.key_head, place.key_start)
                + key * backward_sizes.d_key.row + chunk * HEAD_CHUNK;
            store_row<HEAD_CHUNK_FRAGMENTS, HEAD_CHUNKS_WHOLE>(key_row, min(HEAD_CHUNK, HEAD_DIM - chunk * HEAD_CHUNK),
                                                               backward_factors.scale, lane, sums.keys[r]);
#endif
#if VALUE_GRADIENT
            device scalar* value_row =
                d_value + row_offset(backward_sizes.d_value, place.batch, place.key_head, place.key_start)
                + key * backward_sizes.d_value.row + chunk * VALUE_CHUNK;
            store_row<VALUE_CHUNK_FRAGMENTS, VALUE_CHUNKS_WHOLE>(
                value_row, min(VALUE_CHUNK, VALUE_DIM - chunk * VALUE_CHUNK), DROPOUT ? factors.kept : 1.0f, lane,
                sums.values[r]);
#endif
        }
    }
}
