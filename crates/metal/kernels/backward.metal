// What the kernels of the backward pass share.
//
// For a query i and a key j that it sees, with the LSE and O of the forward pass and delta = rowsum(dO * O) - dLSE:
//   P = exp2(S - LSE)        dP = dO V^T        dS = P (dP - delta), times the derivative of the softcap
//   dQ = scale dS K          dK = scale dS^T Q          dV = P^T dO
// DROPOUT multiplies P in dV, and dP, by 0 or `kept`; the kernels sum P of the kept and multiply dV at the end.
// Each kernel sums gradients of rows that its simdgroups own, so that no sum is shared: queries for dQ, keys for dK and dV.
// A simdgroup owns ROWS = 8 * ROW_FRAGMENTS rows and walks over blocks of BLOCK rows of the other kind that see them, or
// that they see. Every product is one of two: rows times rows of a block, along the dimensions (S and dP, or their
// transposes), and weights times a block, along its rows (the sums). Nothing but sums outlives a block.
// S, dP, P and dS are float in registers; P and dS are rounded to scalar for the sums, as P is in the forward pass.

constant constexpr int ROWS = 8 * ROW_FRAGMENTS;
constant constexpr int BLOCK_FRAGMENTS = BLOCK / 8;
constant constexpr int HEAD_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int VALUE_FRAGMENTS = (VALUE_DIM + 7) / 8;
constant constexpr int HEAD_DEALS = (HEAD_FRAGMENTS + HEAD_DEAL - 1) / HEAD_DEAL;
constant constexpr int VALUE_DEALS = (VALUE_FRAGMENTS + HEAD_DEAL - 1) / HEAD_DEAL;
constant constexpr bool HEAD_WHOLE = HEAD_DIM % 8 == 0;
constant constexpr bool VALUE_WHOLE = VALUE_DIM % 8 == 0;
// Columns of a gradient that a threadgroup sums, and the first of them.
constant constexpr int HEAD_CHUNK_FRAGMENTS = HEAD_CHUNK / 8;
constant constexpr int VALUE_CHUNK_FRAGMENTS = VALUE_CHUNK / 8;
constant constexpr bool HEAD_CHUNKS_WHOLE = HEAD_DIM % HEAD_CHUNK == 0;
constant constexpr bool VALUE_CHUNKS_WHOLE = VALUE_DIM % VALUE_CHUNK == 0;

#if STAGED
// Length of a staged row in scalar4, filled up to whole chunks, and with the 16 bytes that spread rows over the banks.
constant constexpr int HEAD_LENGTH = (HEAD_DIM + HEAD_CHUNK - 1) / HEAD_CHUNK * HEAD_CHUNK / 4;
constant constexpr int VALUE_LENGTH = (VALUE_DIM + VALUE_CHUNK - 1) / VALUE_CHUNK * VALUE_CHUNK / 4;
constant constexpr int HEAD_PITCH = HEAD_LENGTH + 16 / int(sizeof(scalar4));
constant constexpr int VALUE_PITCH = VALUE_LENGTH + 16 / int(sizeof(scalar4));
#endif

// The int64 list of a launch, in the order of backward.rs.
struct BackwardSizes {
    Sizes forward;  // out and lse are those of the forward pass; value_chunks counts chunks of the gradient
    Strides d_out;
    Strides d_query;
    Strides d_key;
    Strides d_value;
};

// The float32 list of a launch.
struct BackwardFactors {
    Factors forward;
    float scale;  // the softmax scale
};

// What the gradients need of a query: its LSE in units of log2 and its delta.
typedef float2 RowState;

// A block of rows as a simdgroup reads it.
struct Block {
    block_pointer head;   // of k or q
    block_pointer value;  // of v or dO
    long head_stride;
    long value_stride;
    int first;  // query or key of row 0
    int last;   // row of the last one of the sequence, if it is in this block
};

// A head as its scores need it.
struct Head {
    device const RowState* states;  // of query 0
#if ALIBI
    float slope;  // times log2(e)
#endif
#if BIAS
    device const bias_scalar* bias;  // of query 0 and key 0
#endif
};

Head head_of(Place place, constant Sizes& sizes, device const RowState* states
#if ALIBI
    , device const float* alibi_slopes
#endif
#if BIAS
    , device const bias_scalar* bias
#endif
) {
    Head head;
    head.states = states + (place.batch * sizes.lse_batch + place.head * sizes.lse_head + place.query_start);
#if ALIBI
    head.slope = alibi_slopes[place.batch * sizes.alibi_batch + place.head * sizes.alibi_head] * LOG2_E;
#endif
#if BIAS
    head.bias = bias + (place.batch * sizes.bias_batch + place.head * sizes.bias_head);
#endif
    return head;
}

// The weight P of a visible key, and what dP - delta is multiplied by to give dS.
float2 weigh(float product, float lse, int query, int key, Head head, Place place, constant Sizes& sizes,
             constant Factors& factors) {
#if SCORE_MODIFIED
    RowModifiers row;
    row.position = query + place.diagonal;
#if ALIBI
    row.slope = head.slope;
#endif
#if BIAS
    row.bias = head.bias + query * sizes.bias_query;
#endif
    const float score = modified_score(product * factors.query, key, row, sizes, factors);
    const float weight = fast::exp2(score - lse);
#else
    const float weight = fast::exp2(fma(product, factors.query * factors.score, -lse));
#endif
#if SOFTCAP
    const float saturated = saturation(product * factors.query, factors);
    return float2(weight, weight * fma(-saturated, saturated, 1.0f));
#else
    return float2(weight, weight);
#endif
}

#if DROPOUT
// A weight is not negative until dropout makes it so. -0 is a weight too.
float mark_dropped(float weight) {
    return as_type<float>(as_type<uint>(weight) | 0x80000000u);
}
#endif

// dS of a weight and its product dP; a weight that dropout has marked is dropped.
float score_gradient(float weight, float product, float delta, constant Factors& factors) {
#if DROPOUT
    const bool dropped = (as_type<uint>(weight) & 0x80000000u) != 0u;
    return abs(weight) * ((dropped ? 0.0f : product * factors.kept) - delta);
#else
    return weight * (product - delta);
#endif
}

// The rows that a simdgroup owns, as far as a lane holds them: one row of each row fragment.
template <int FRAGMENTS, bool WHOLE, int WIDTH>
struct Owned {
#if OWN_IN_REGISTERS
    Operand fragments[ROW_FRAGMENTS][FRAGMENTS];
#elif OWN_IN_THREADGROUP
    threadgroup scalar4* parked;  // of this simdgroup
#else
    device const scalar* rows[ROW_FRAGMENTS];
#endif
};
typedef Owned<HEAD_FRAGMENTS, HEAD_WHOLE, HEAD_DIM> OwnedHead;
typedef Owned<VALUE_FRAGMENTS, VALUE_WHOLE, VALUE_DIM> OwnedValue;

#if OWN_IN_THREADGROUP
// Where a lane parks its two scalar4 of the fragments of row fragment r that deal with fragment `first`.
template <int FRAGMENTS>
int parked_at(int r, int first, Lane lane) {
    return (r * ((FRAGMENTS + HEAD_DEAL - 1) / HEAD_DEAL) + first / HEAD_DEAL) * 64 + lane.index * 2;
}
#endif

// Takes a row into row fragment r.
template <int FRAGMENTS, bool WHOLE, int WIDTH>
void own(int r, device const scalar* row, Lane lane, thread Owned<FRAGMENTS, WHOLE, WIDTH>& owned) {
#if OWN_IN_REGISTERS
#pragma clang loop unroll(full)
    for (int first = 0; first < FRAGMENTS; first += HEAD_DEAL) {
        const scalar4 evens = head_elements<FRAGMENTS, WHOLE>(row, first, lane.column, WIDTH);
        const scalar4 odds = head_elements<FRAGMENTS, WHOLE>(row, first, lane.column + 1, WIDTH);
#pragma clang loop unroll(full)
        for (int i = 0; i < HEAD_DEAL && first + i < FRAGMENTS; ++i) {
            owned.fragments[r][first + i] = operand(evens[i], odds[i]);
        }
    }
#elif OWN_IN_THREADGROUP
    for (int first = 0; first < FRAGMENTS; first += HEAD_DEAL) {
        const scalar4 evens = head_elements<FRAGMENTS, WHOLE>(row, first, lane.column, WIDTH);
        const scalar4 odds = head_elements<FRAGMENTS, WHOLE>(row, first, lane.column + 1, WIDTH);
        owned.parked[parked_at<FRAGMENTS>(r, first, lane)] = scalar4(evens[0], odds[0], evens[1], odds[1]);
        owned.parked[parked_at<FRAGMENTS>(r, first, lane) + 1] = scalar4(evens[2], odds[2], evens[3], odds[3]);
    }
#else
    owned.rows[r] = row;
#endif
}

// Fragments first, first + 1, .. of row fragment r.
template <int FRAGMENTS, bool WHOLE, int WIDTH>
void read_owned(int r, int first, Lane lane, thread const Owned<FRAGMENTS, WHOLE, WIDTH>& owned,
                thread Operand (&fragments)[HEAD_DEAL]) {
#if OWN_IN_REGISTERS
#pragma clang loop unroll(full)
    for (int i = 0; i < HEAD_DEAL && first + i < FRAGMENTS; ++i) {
        fragments[i] = owned.fragments[r][first + i];
    }
#elif OWN_IN_THREADGROUP
    const scalar4 low = owned.parked[parked_at<FRAGMENTS>(r, first, lane)];
    const scalar4 high = owned.parked[parked_at<FRAGMENTS>(r, first, lane) + 1];
    fragments[0] = operand(low[0], low[1]);
    fragments[1] = operand(low[2], low[3]);
    fragments[2] = operand(high[0], high[1]);
    fragments[3] = operand(high[2], high[3]);
#else
    const scalar4 evens = head_elements<FRAGMENTS, WHOLE>(owned.rows[r], first, lane.column, WIDTH);
    const scalar4 odds = head_elements<FRAGMENTS, WHOLE>(owned.rows[r], first, lane.column + 1, WIDTH);
#pragma clang loop unroll(full)
    for (int i = 0; i < HEAD_DEAL; ++i) {
        fragments[i] = operand(evens[i], odds[i]);
    }
#endif
}

// Owned rows times the rows of a block: S or dP, or their transposes.
template <bool EDGE, int FRAGMENTS, bool WHOLE, int WIDTH>
void multiply_rows(block_pointer block, long stride, int last, Lane lane,
                   thread const Owned<FRAGMENTS, WHOLE, WIDTH>& owned,
                   thread Accumulator (&products)[ROW_FRAGMENTS][BLOCK_FRAGMENTS]) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
            products[r][f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
#if OWN_IN_REGISTERS
#pragma clang loop unroll(full)
#else
#pragma clang loop unroll(disable)
#endif
    for (int first = 0; first < FRAGMENTS; first += HEAD_DEAL) {
        Operand fragments[ROW_FRAGMENTS][HEAD_DEAL];
#pragma clang loop unroll(full)
        for (int r = 0; r < ROW_FRAGMENTS; ++r) {
            read_owned(r, first, lane, owned, fragments[r]);
        }
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
            block_pointer even = block_row<EDGE>(block, stride, lane.column, f, last);
            block_pointer odd = block_row<EDGE>(block, stride, lane.column + 1, f, last);
            const scalar4 evens = head_elements<FRAGMENTS, WHOLE>(even, first, lane.row, WIDTH);
            const scalar4 odds = head_elements<FRAGMENTS, WHOLE>(odd, first, lane.row, WIDTH);
#pragma clang loop unroll(full)
            for (int i = 0; i < HEAD_DEAL; ++i) {
                if (FRAGMENTS % HEAD_DEAL != 0 && first + i >= FRAGMENTS) {
                    continue;
                }
                const Operand row = operand(evens[i], odds[i]);  // transposed: a lane holds one dimension of two rows
#pragma clang loop unroll(full)
                for (int r = 0; r < ROW_FRAGMENTS; ++r) {
                    simdgroup_multiply_accumulate(products[r][f], fragments[r][i], row, products[r][f]);
                }
            }
        }
    }
}

// Adds weights times a block to sums of FRAGMENTS * 8 columns, of which `width` exist.
template <bool EDGE, int FRAGMENTS, bool WHOLE>
void add_rows(block_pointer block, long stride, int last, int width, Lane lane,
              thread const Operand (&weights)[ROW_FRAGMENTS][BLOCK_FRAGMENTS],
              thread Accumulator (&sums)[ROW_FRAGMENTS][FRAGMENTS]) {
#pragma clang loop unroll(full)
    for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
        block_pointer row = block_row<EDGE>(block, stride, lane.row, f, last);
#pragma clang loop unroll(full)
        for (int first = 0; first < FRAGMENTS; first += VALUE_DEAL) {
            const scalar4 elements = value_elements<FRAGMENTS, WHOLE>(row, first, lane.column, width);
#pragma clang loop unroll(full)
            for (int i = 0; i < VALUE_DEAL; ++i) {
                if (FRAGMENTS % VALUE_DEAL != 0 && first + i >= FRAGMENTS) {
                    continue;
                }
                const Operand pair = operand(elements[2 * i], elements[2 * i + 1]);
#pragma clang loop unroll(full)
                for (int r = 0; r < ROW_FRAGMENTS; ++r) {
                    simdgroup_multiply_accumulate(sums[r][first + i], weights[r][f], pair, sums[r][first + i]);
                }
            }
        }
    }
}

// The products of a block that was multiplied with all rows, as operands.
void round_products(thread const Accumulator (&products)[ROW_FRAGMENTS][BLOCK_FRAGMENTS],
                    thread Operand (&rounded)[ROW_FRAGMENTS][BLOCK_FRAGMENTS]) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int f = 0; f < BLOCK_FRAGMENTS; ++f) {
            rounded[r][f] = operand(scalar(products[r][f].thread_elements()[0]), scalar(products[r][f].thread_elements()[1]));
        }
    }
}

template <int FRAGMENTS>
void clear_sums(thread Accumulator (&sums)[ROW_FRAGMENTS][FRAGMENTS]) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_FRAGMENTS; ++r) {
#pragma clang loop unroll(full)
        for (int v = 0; v < FRAGMENTS; ++v) {
            sums[r][v] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
}

// Writes row `lane.row` of the sums of a row fragment, times a factor, to a row of a gradient with `width` columns.
template <int FRAGMENTS, bool WHOLE>
void store_row(device scalar* row, int width, float factor, Lane lane, thread const Accumulator (&sums)[FRAGMENTS]) {
#pragma clang loop unroll(full)
    for (int v = 0; v < FRAGMENTS; ++v) {
#pragma clang loop unroll(full)
        for (int e = 0; e < 2; ++e) {
            const int column = value_dimension<FRAGMENTS>(v, lane.column + e);
            if (WHOLE || column < width) {
                row[column] = scalar(sums[v].thread_elements()[e] * factor);
            }
        }
    }
}

#if STAGED
// Where the columns of a chunk start in a row of a block.
constexpr int chunk_start(int chunk, int columns) {
    return chunk * columns / 4;
}
#else
constexpr int chunk_start(int chunk, int columns) {
    return chunk * columns;
}
#endif

