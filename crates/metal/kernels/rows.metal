// What a simdgroup computes of attention with 8x8 matrices: S, P, O and the softmax state of ROWS = 8 * ROW_FRAGMENTS rows
// for one block of KEYS keys, all in registers.
//
//   S = Q K^T [ROWS, KEYS]; P = exp2(S - maximum); O = P V + O * correction [ROWS, VALUE_CHUNK]; sum += P
// What lives where:
//   registers    S float, P and the fragments of K and V scalar, O float, maximum, sum; Q if it fits
//   threadgroup  STAGED: the block of K and of V; QUERY_IN_THREADGROUP: Q, each lane its own part
//   device       Q, K, V, read where they lie, whatever their strides
// Which elements a lane holds, and how it loads them, is in fragments.metal. No barriers.

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

// Row `row` of Q becomes the row of fragment r that a lane is part of. The sign of the scale goes into it, and changes no
// digit.
void set_queries(int r, device const scalar* row, float sign, Lane lane,
#if QUERY_IN_THREADGROUP
                 threadgroup scalar4* parked,
#endif
                 thread Rows& rows) {
#if QUERY_IN_DEVICE
    rows.values[r] = row;
    rows.sign = sign;
#else
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
}

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
#if DROPOUT
    uint4 words;
#endif
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int f = 0; f < KEY_FRAGMENTS; ++f) {
#if DROPOUT
            const int call = r * KEY_FRAGMENTS + f;
            if (call % 4 == 0) {
                words = row_words<KEY_FRAGMENTS>(call, rows.query, block.first, lane, place, sizes);
            }
#endif
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const float score = scores[r][f].thread_elements()[e];
                const float weight = fast::exp2(scaled ? score - rows.maximum[r]
                                                       : fma(score, factors.score, -rows.maximum[r]));
                rows.sum[r] += weight;
#if DROPOUT
                weights[r][f].thread_elements()[e] = scalar(is_kept(words[call % 4], e, sizes) ? weight : 0.0f);
#else
                weights[r][f].thread_elements()[e] = scalar(weight);
#endif
            }
        }
    }

#pragma clang loop unroll(full)
    for (int f = 0; f < KEY_FRAGMENTS; ++f) {
        multiply_values<EDGE>(f, block, columns, lane, weights, rows);
    }
}

// Writes the columns of O that a lane has of row fragment r, times `factor`.
template <typename Element>
void store_columns(device Element* row, int r, float factor, int columns, Lane lane, thread Rows& rows) {
#pragma clang loop unroll(full)
    for (int v = 0; v < VALUE_FRAGMENTS; ++v) {
#pragma clang loop unroll(full)
        for (int e = 0; e < 2; ++e) {
            const int column = value_dimension<VALUE_FRAGMENTS>(v, lane.column + e);
            if (VALUE_WHOLE || column < columns) {
                row[column] = Element(rows.out[r][v].thread_elements()[e] * factor);
            }
        }
    }
}
