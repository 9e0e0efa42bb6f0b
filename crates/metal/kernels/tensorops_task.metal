// What the tensorops kernel works on: the rows of a simdgroup, blocks of keys, and how their elements are loaded by lanes.

constant constexpr uint NOT_A_NUMBER = 0x7fc00000u;

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int ROWS = 8 * ROW_FRAGMENTS;
constant constexpr int HEAD_WIDTH = (HEAD_DIM + HEAD_STEP - 1) / HEAD_STEP * HEAD_STEP;
// 16 bytes behind every row spread rows over the banks.
constant constexpr int PADDING = 16 / int(sizeof(scalar));
constant constexpr int HEAD_PITCH = HEAD_WIDTH + PADDING;
constant constexpr int VALUE_PITCH = VALUE_CHUNK + PADDING;
// The type of P as an operand.
#if WEIGHTS_IN_THREADGROUP || WEIGHTS_NARROW
typedef scalar weight;
#else
typedef float weight;
#endif

typedef tensor<threadgroup scalar, dextents<int, 2>, tensor_inline> ThreadgroupTile;
#if STAGED
typedef ThreadgroupTile BlockTile;
#else
// matmul2d refuses elements that are const, even of operands that it only reads.
typedef tensor<device scalar, dextents<int, 2>, tensor_inline> BlockTile;
#endif

// The rows of a simdgroup and what they attend to: the same in all its lanes.
struct Task {
    constant Sizes* sizes;
    constant Factors* factors;
    device const scalar* queries;
    device const scalar* keys;
    device const scalar* values;  // from the first column of the chunk on
    device scalar* results;
#if LSE
    device uint* lse;        // of query 0, in the first chunk
#endif
#if BIAS
    device const bias_scalar* bias;  // of query 0 and key 0
#endif
#if ALIBI
    float slope;
#endif
#if SINKS
    float sink;
#endif
    threadgroup scalar* parked_queries;
    threadgroup scalar* parked_weights;
    threadgroup float* row_values;
    threadgroup scalar* staged_keys;
    threadgroup scalar* staged_values;
    Place place;
    int first_query;
    int last_query;  // the last row that exists; those behind it repeat it, and are not stored
    int columns;     // of the chunk that are in the tensor
    float sign;      // of the softmax scale
    KeyRange seen;   // by some row
    KeyRange full;   // by every row
    KeyRange loop;   // seen by some row of the threadgroup where its simdgroups wait for one another
    int simdgroup;
    int lane;
};

// A block of keys.
struct Block {
    int first;    // key of row 0
    int counted;  // keys below this one were in the block before
    bool edge;    // some row may not see some key of it
};

// Element of Q for a row of the simdgroup, with the sign of the scale, which changes no digit; 0 behind the head dimension.
scalar query_element(thread const Task& task, int row, int column) {
    const int query = min(task.first_query + row, task.last_query);
    return column < HEAD_DIM ? scalar(float(task.queries[query * task.sizes->q.row + column]) * task.sign) : scalar(0);
}

// Elements of K and V; keys past the end are the last one.
scalar key_element(thread const Task& task, int key, int column) {
    const int row = min(key, task.place.key_len - 1);
    return column < HEAD_DIM ? task.keys[row * task.sizes->k.row + column] : scalar(0);
}

scalar value_element(thread const Task& task, int key, int column) {
    const int row = min(key, task.place.key_len - 1);
    return column < task.columns ? task.values[row * task.sizes->v.row + column] : scalar(0);
}

#if STAGED
typedef vec<scalar, 4> scalar4;

// Copies WIDTH columns of the rows of a block, of which the first `width` exist, four elements a thread at a time: zeros
// behind them, and the last row in the place of those past the end. The loads of a thread wait for no store.
template <int WIDTH, int PITCH>
void stage_rows(device const scalar* rows, long stride, int width, int first, thread const Task& task,
                threadgroup scalar* staged) {
    constexpr int threads = 32 * SIMDGROUPS;
    constexpr int fours = KEYS * WIDTH / 4;
    constexpr int steps = (fours + threads - 1) / threads;
    const int thread_index = 32 * task.simdgroup + task.lane;
    scalar4 loaded[steps];
    UNROLL
    for (int step = 0; step < steps; ++step) {
        const int i = min(threads * step + thread_index, fours - 1);
        const int column = i % (WIDTH / 4) * 4;
        device const scalar* row = rows + min(first + i / (WIDTH / 4), task.place.key_len - 1) * stride + column;
#if ALIGNED
        loaded[step] = column < width ? *(device const scalar4*)row : scalar4(scalar(0));
#else
        UNROLL
        for (int j = 0; j < 4; ++j) {
            loaded[step][j] = column + j < width ? row[j] : scalar(0);
        }
#endif
    }
    UNROLL
    for (int step = 0; step < steps; ++step) {
        const int i = threads * step + thread_index;
        if (fours % threads == 0 || i < fours) {
            *(threadgroup scalar4*)(staged + i / (WIDTH / 4) * PITCH + i % (WIDTH / 4) * 4) = loaded[step];
        }
    }
}

// All simdgroups copy a block of K and of V.
void stage_block(thread const Task& task, int first) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
    stage_rows<HEAD_WIDTH, HEAD_PITCH>(task.keys, task.sizes->k.row, HEAD_DIM, first, task, task.staged_keys);
    stage_rows<VALUE_CHUNK, VALUE_PITCH>(task.values, task.sizes->v.row, task.columns, first, task, task.staged_values);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // this block has been written
}
#endif
