// Attention forward with 8x8 simdgroup matrices: S, P, O and the softmax state never leave the registers.
//
// One threadgroup: SIMDGROUPS * ROWS consecutive queries of one head of one sequence, VALUE_CHUNK columns of v.
//   threads (32, SIMDGROUPS, 1); threadgroups (queries / rows, heads * value chunks, sequences)
// One simdgroup: ROWS = 8 * ROW_FRAGMENTS queries, in a loop over blocks of KEYS keys that any of them sees:
//   S = Q K^T [ROWS, KEYS]; P = exp2(S - maximum); O = P V + O * correction [ROWS, VALUE_CHUNK]; sum += P
// What lives where:
//   registers    S float, P and the fragments of K and V scalar, O float, maximum, sum; Q if it fits
//   threadgroup  STAGED: one block of K and one of V, for all simdgroups; QUERY_IN_THREADGROUP: Q, each lane its own part
//   device       Q, K, V, read where they lie, whatever their strides
// Which elements a lane holds, and how it loads them, is in fragments.metal.
// Barriers, only if STAGED: one after a block was written, before anyone reads it; one after it was read, before the next
// is written. Both are reached by all simdgroups the same number of times.

constant constexpr int ROWS = 8 * ROW_FRAGMENTS;
constant constexpr int KEY_FRAGMENTS = KEYS / 8;
constant constexpr int HEAD_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int VALUE_FRAGMENTS = VALUE_CHUNK / 8;
constant constexpr int HEAD_DEALS = (HEAD_FRAGMENTS + HEAD_DEAL - 1) / HEAD_DEAL;
// Whether the fragments of a row hold elements of the tensor and no others.
constant constexpr bool HEAD_WHOLE = HEAD_DIM % 8 == 0;
constant constexpr bool VALUE_WHOLE = VALUE_DIM % VALUE_CHUNK == 0;

#if STAGED
// Length of a staged row in scalar4; 16 bytes behind every row spread rows over the banks.
constant constexpr int KEY_PITCH = 2 * HEAD_FRAGMENTS + 16 / int(sizeof(scalar4));
constant constexpr int VALUE_PITCH = 2 * VALUE_FRAGMENTS + 16 / int(sizeof(scalar4));
#endif

// A block of keys and values as a simdgroup reads it.
struct Block {
    block_pointer keys;
    block_pointer values;
    long key_stride;
    long value_stride;
    int first;  // key of row 0
    int last;   // row of the last key of the sequence, if it is in this block
};

// The queries of a simdgroup, as far as a lane holds them: one row of each row fragment.
struct Rows {
    Accumulator out[ROW_FRAGMENTS][VALUE_FRAGMENTS];
    float maximum[ROW_FRAGMENTS];
    float sum[ROW_FRAGMENTS];  // of this lane's columns
    int query[ROW_FRAGMENTS];
#if SCORE_MODIFIED
    RowModifiers modifiers[ROW_FRAGMENTS];
#endif
#if QUERY_IN_REGISTERS
    Operand values[ROW_FRAGMENTS][HEAD_FRAGMENTS];
#elif QUERY_IN_THREADGROUP
    threadgroup const scalar4* values;
#else
    device const scalar* values[ROW_FRAGMENTS];
    float sign;
#endif
};

#if QUERY_IN_THREADGROUP
// Where a lane parks its two scalar4 of the fragments of row fragment r that deal with fragment `first`.
int parked_at(int r, int first, Lane lane) {
    return (r * HEAD_DEALS + first / HEAD_DEAL) * 64 + lane.index * 2;
}
#endif

// Fragments first, first + 1, .. of row fragment r of Q.
void read_queries(int r, int first, Lane lane, thread const Rows& rows, thread Operand (&queries)[HEAD_DEAL]) {
#if QUERY_IN_REGISTERS
#pragma clang loop unroll(full)
    for (int i = 0; i < HEAD_DEAL && first + i < HEAD_FRAGMENTS; ++i) {
        queries[i] = rows.values[r][first + i];
    }
#else
#if QUERY_IN_THREADGROUP
    const scalar4 low = rows.values[parked_at(r, first, lane)];
    const scalar4 high = rows.values[parked_at(r, first, lane) + 1];
    queries[0] = operand(low[0], low[1]);
    queries[1] = operand(low[2], low[3]);
    queries[2] = operand(high[0], high[1]);
    queries[3] = operand(high[2], high[3]);
#else
    const scalar4 evens = head_elements<HEAD_FRAGMENTS, HEAD_WHOLE>(rows.values[r], first, lane.column, HEAD_DIM);
    const scalar4 odds = head_elements<HEAD_FRAGMENTS, HEAD_WHOLE>(rows.values[r], first, lane.column + 1, HEAD_DIM);
#pragma clang loop unroll(full)
    for (int i = 0; i < HEAD_DEAL; ++i) {
        queries[i] = operand(evens[i], odds[i]);
    }
#endif
#endif
}

// S of key fragment f of a block.
template <bool EDGE>
void multiply_keys(int f, Block block, Lane lane, thread const Rows& rows, thread Accumulator (&scores)[ROW_FRAGMENTS][KEY_FRAGMENTS]) {
    block_pointer even = block_row<EDGE>(block.keys, block.key_stride, lane.column, f, block.last);
    block_pointer odd = block_row<EDGE>(block.keys, block.key_stride, lane.column + 1, f, block.last);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        scores[r][f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
#if QUERY_IN_REGISTERS
#pragma clang loop unroll(full)
#else
#pragma clang loop unroll(disable)
#endif
    for (int first = 0; first < HEAD_FRAGMENTS; first += HEAD_DEAL) {
        const scalar4 evens = head_elements<HEAD_FRAGMENTS, HEAD_WHOLE>(even, first, lane.row, HEAD_DIM);
        const scalar4 odds = head_elements<HEAD_FRAGMENTS, HEAD_WHOLE>(odd, first, lane.row, HEAD_DIM);
        Operand queries[ROW_FRAGMENTS][HEAD_DEAL];
#pragma clang loop unroll(full)
        for (int r = 0; r < ROW_FRAGMENTS; ++r) {
            read_queries(r, first, lane, rows, queries[r]);
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < HEAD_DEAL; ++i) {
            if (HEAD_FRAGMENTS % HEAD_DEAL != 0 && first + i >= HEAD_FRAGMENTS) {
                continue;
            }
            const Operand key = operand(evens[i], odds[i]);  // transposed: a lane holds one dimension of two keys
#pragma clang loop unroll(full)
            for (int r = 0; r < ROW_FRAGMENTS; ++r) {
                simdgroup_multiply_accumulate(scores[r][f], queries[r][i], key, scores[r][f]);
            }
        }
    }
}

// O += P V for key fragment f of a block.
template <bool EDGE>
void multiply_values(int f, Block block, int columns, Lane lane,
                     thread const Operand (&weights)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread Rows& rows) {
    block_pointer row = block_row<EDGE>(block.values, block.value_stride, lane.row, f, block.last);
#pragma clang loop unroll(full)
    for (int first = 0; first < VALUE_FRAGMENTS; first += VALUE_DEAL) {
        const scalar4 elements = value_elements<VALUE_FRAGMENTS, VALUE_WHOLE>(row, first, lane.column, columns);
#pragma clang loop unroll(full)
        for (int i = 0; i < VALUE_DEAL; ++i) {
            if (VALUE_FRAGMENTS % VALUE_DEAL != 0 && first + i >= VALUE_FRAGMENTS) {
                continue;
            }
            const Operand value = operand(elements[2 * i], elements[2 * i + 1]);
#pragma clang loop unroll(full)
            for (int r = 0; r < ROW_FRAGMENTS; ++r) {
                simdgroup_multiply_accumulate(rows.out[r][first + i], weights[r][f], value, rows.out[r][first + i]);
            }
        }
    }
}

// Takes a block of keys into account. EDGE: some row may not see some key of it.
template <bool EDGE>
void add_block(Block block, int columns, Lane lane, Place place, constant Sizes& sizes, constant Factors& factors,
               thread Rows& rows) {
    Accumulator scores[ROW_FRAGMENTS][KEY_FRAGMENTS];
#pragma clang loop unroll(full)
    for (int f = 0; f < KEY_FRAGMENTS; ++f) {
        multiply_keys<EDGE>(f, block, lane, rows, scores);
    }

    // Scores leave the products unscaled where one fma can scale them and subtract the maximum.
    constexpr bool scaled = EDGE || SCORE_MODIFIED;
    float correction[ROW_FRAGMENTS];
    bool corrected = false;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        float maximum = HIDDEN;
        // What the row sees, counted from the key of this lane's first column.
        const KeyRange visible = visible_keys(rows.query[r], place, sizes);
        const int start = visible.start - block.first - lane.column;
        const int end = visible.end - block.first - lane.column;
#pragma clang loop unroll(full)
        for (int f = 0; f < KEY_FRAGMENTS; ++f) {
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                float score = scores[r][f].thread_elements()[e];
#if QUERY_IN_DEVICE
                score *= rows.sign;
#endif
#if SCORE_MODIFIED
                const int row = 8 * f + lane.column + e;
                const int key = block.first + (EDGE ? min(row, block.last) : row);
                score = modified_score(score, key, rows.modifiers[r], sizes, factors);
#else
                score = scaled ? score * factors.score : score;
#endif
                if (EDGE) {
                    score = 8 * f + e >= start && 8 * f + e < end ? score : HIDDEN;
                }
                scores[r][f].thread_elements()[e] = score;
                maximum = max(maximum, score);
            }
        }
        maximum = max(maximum, simd_shuffle_xor(maximum, 1));
        maximum = max(maximum, simd_shuffle_xor(maximum, 8));
        maximum = scaled ? maximum : maximum * factors.score;
        const float old = rows.maximum[r];
        rows.maximum[r] = maximum > old + MAXIMUM_LAG ? maximum : old;
        correction[r] = fast::exp2(old - rows.maximum[r]);
        corrected = corrected || rows.maximum[r] != old;
    }
    if (simd_any(corrected)) {
#pragma clang loop unroll(full)
        for (int r = 0; r < ROW_FRAGMENTS; ++r) {
            rows.sum[r] *= correction[r];
#pragma clang loop unroll(full)
            for (int v = 0; v < VALUE_FRAGMENTS; ++v) {
                rows.out[r][v].thread_elements()[0] *= correction[r];
                rows.out[r][v].thread_elements()[1] *= correction[r];
            }
        }
    }

    Operand weights[ROW_FRAGMENTS][KEY_FRAGMENTS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int f = 0; f < KEY_FRAGMENTS; ++f) {
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const float score = scores[r][f].thread_elements()[e];
                const float weight = fast::exp2(scaled ? score - rows.maximum[r]
                                                       : fma(score, factors.score, -rows.maximum[r]));
                rows.sum[r] += weight;
                weights[r][f].thread_elements()[e] = scalar(weight);
            }
        }
    }

#pragma clang loop unroll(full)
    for (int f = 0; f < KEY_FRAGMENTS; ++f) {
        multiply_values<EDGE>(f, block, columns, lane, weights, rows);
    }
}

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
    const float sign = factors.query;

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
#if QUERY_IN_DEVICE
        rows.values[r] = row;
        rows.sign = sign;
#else
        // The sign of the scale changes no digit of q.
#if QUERY_IN_REGISTERS
#pragma clang loop unroll(full)
#endif
        for (int first = 0; first < HEAD_FRAGMENTS; first += HEAD_DEAL) {
            const scalar4 even = head_elements<HEAD_FRAGMENTS, HEAD_WHOLE>(row, first, lane.column, HEAD_DIM);
            const scalar4 odd = head_elements<HEAD_FRAGMENTS, HEAD_WHOLE>(row, first, lane.column + 1, HEAD_DIM);
            const scalar4 evens = scalar4(float4(even) * sign);
            const scalar4 odds = scalar4(float4(odd) * sign);
#if QUERY_IN_REGISTERS
#pragma clang loop unroll(full)
            for (int i = 0; i < HEAD_DEAL && first + i < HEAD_FRAGMENTS; ++i) {
                rows.values[r][first + i] = operand(evens[i], odds[i]);
            }
#else
            parked[parked_at(r, first, lane)] = scalar4(evens[0], odds[0], evens[1], odds[1]);
            parked[parked_at(r, first, lane) + 1] = scalar4(evens[2], odds[2], evens[3], odds[3]);
#endif
        }
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
            const float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
            device scalar* row = results + query * sizes.out.row;
#pragma clang loop unroll(full)
            for (int v = 0; v < VALUE_FRAGMENTS; ++v) {
#pragma clang loop unroll(full)
                for (int e = 0; e < 2; ++e) {
                    const int column = value_dimension<VALUE_FRAGMENTS>(v, lane.column + e);
                    if (VALUE_DIM % VALUE_CHUNK == 0 || column < columns) {
                        row[column] = scalar(rows.out[r][v].thread_elements()[e] * normalizer);
                    }
                }
            }
#if LSE
            if (place.value_chunk == 0 && lane.column == 0) {
                lse[place.batch * sizes.lse_batch + place.head * sizes.lse_head + place.query_start + query] =
                    lse_bits(rows.maximum[r], sum);
            }
#endif
        }
    }
}
