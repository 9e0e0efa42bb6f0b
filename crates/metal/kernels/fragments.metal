// 8x8 fragments: which elements a lane holds, and how it loads them.
//
// The lane map, the same for both operands of a product and its result: with quad = lane / 4, a lane holds the two elements
// (row, column) and (row, column + 1), row = (quad & 4) + lane / 2 % 4, column = (quad & 2) * 2 + lane % 2 * 2. A row lies
// in four lanes that differ in bits 0 and 3. A result is therefore an operand of the next product as it lies, but for its
// type. Fragments are loaded lane by lane, which takes any row address: rows past the end of a sequence are read as its
// last row, and hidden by the mask. It also leaves open which dimension a row or column of a fragment stands for, as long
// as both operands, or operand and result, agree: neighbouring fragments deal theirs out in turn, so that what a lane needs
// of a row for four of them (one element each), or for two (a pair each), are 4 elements side by side. See
// head_dimension() and value_dimension().

typedef simdgroup_matrix<scalar, 8, 8> Operand;
typedef simdgroup_matrix<float, 8, 8> Accumulator;
typedef vec<scalar, 4> scalar4;

// Fragments that deal out their dimensions together: of rows that a product runs along, and of rows that it adds up.
constant constexpr int HEAD_DEAL = 4;
constant constexpr int VALUE_DEAL = 2;

#if STAGED
typedef threadgroup const scalar4* block_pointer;
#else
typedef device const scalar* block_pointer;
#endif

// Place of a lane in every fragment.
struct Lane {
    int index;
    int row;
    int column;
};

Lane lane_of(uint index) {
    Lane lane;
    lane.index = int(index);
    const int quad = lane.index / 4;
    lane.row = (quad & 4) + lane.index / 2 % 4;
    lane.column = (quad & 2) * 2 + lane.index % 2 * 2;
    return lane;
}

// The dimension that `position` of one of FRAGMENTS fragments stands for where four of them deal theirs out one by one.
template <int FRAGMENTS>
constexpr int head_dimension(int fragment, int position) {
    const int first = fragment / HEAD_DEAL * HEAD_DEAL;
    const int together = FRAGMENTS - first < HEAD_DEAL ? FRAGMENTS - first : HEAD_DEAL;
    return first * 8 + position * together + fragment - first;
}

// The same where two deal theirs out in pairs, since a lane holds a pair of each.
template <int FRAGMENTS>
constexpr int value_dimension(int fragment, int position) {
    const int first = fragment / VALUE_DEAL * VALUE_DEAL;
    const int together = FRAGMENTS - first < VALUE_DEAL ? FRAGMENTS - first : VALUE_DEAL;
    return first * 8 + (position / 2 * together + fragment - first) * 2 + position % 2;
}

// Element i of a row that has `width`; 0 behind them.
template <bool WHOLE>
scalar element_of(device const scalar* row, int i, int width) {
    return WHOLE || i < width ? row[i] : scalar(0);
}

// Elements 4 i to 4 i + 3 of it.
template <bool WHOLE>
scalar4 four_of(device const scalar* row, int i, int width) {
#if ALIGNED
    return WHOLE || 4 * i < width ? ((device const scalar4*)row)[i] : scalar4(scalar(0));
#else
    return scalar4(element_of<WHOLE>(row, 4 * i, width), element_of<WHOLE>(row, 4 * i + 1, width),
                   element_of<WHOLE>(row, 4 * i + 2, width), element_of<WHOLE>(row, 4 * i + 3, width));
#endif
}

#if STAGED
// The same of a staged row, whose zeros are in memory.
template <bool WHOLE>
scalar element_of(threadgroup const scalar4* row, int i, int width) {
    return ((threadgroup const scalar*)row)[i];
}

template <bool WHOLE>
scalar4 four_of(threadgroup const scalar4* row, int i, int width) {
    return row[i];
}

// Copies a block of COUNT rows, a scalar4 a thread at a time; the last row takes the place of those behind it.
template <bool WHOLE, int LENGTH, int PITCH, int COUNT>
void stage(threadgroup scalar4* block, device const scalar* rows, long stride, int last, int width, int thread_index) {
#pragma clang loop unroll_count(4)
    for (int i = thread_index; i < COUNT * LENGTH; i += 32 * SIMDGROUPS) {
        const int row = i / LENGTH;
        block[row * PITCH + i % LENGTH] = four_of<WHOLE>(rows + min(row, last) * stride, i % LENGTH, width);
    }
}
#endif

// What a row has at `position` of the four of FRAGMENTS fragments that deal with fragment `first`.
template <int FRAGMENTS, bool WHOLE, typename Pointer>
scalar4 head_elements(Pointer row, int first, int position, int width) {
    if (FRAGMENTS % HEAD_DEAL == 0 || first + HEAD_DEAL <= FRAGMENTS) {
        return four_of<WHOLE>(row, 2 * first + position, width);
    }
    scalar4 elements = scalar4(scalar(0));
#pragma clang loop unroll(full)
    for (int i = 0; i < FRAGMENTS % HEAD_DEAL; ++i) {
        elements[i] = element_of<WHOLE>(row, head_dimension<FRAGMENTS>(first + i, position), width);
    }
    return elements;
}

// What a row has at an even `position` and the next of two of FRAGMENTS fragments, or of the last one.
template <int FRAGMENTS, bool WHOLE, typename Pointer>
scalar4 value_elements(Pointer row, int first, int position, int width) {
    const int i = value_dimension<FRAGMENTS>(first, position);
    if (FRAGMENTS % VALUE_DEAL == 0 || first + VALUE_DEAL <= FRAGMENTS) {
        return four_of<WHOLE>(row, i / 4, width);
    }
    return scalar4(element_of<WHOLE>(row, i, width), element_of<WHOLE>(row, i + 1, width), scalar(0), scalar(0));
}

Operand operand(scalar even, scalar odd) {
    Operand fragment;
    fragment.thread_elements()[0] = even;
    fragment.thread_elements()[1] = odd;
    return fragment;
}

// The address of row lane_row + fragment * 8 of a block.
template <bool EDGE>
block_pointer block_row(block_pointer block, long stride, int lane_row, int fragment, int last) {
#if STAGED
    return block + (lane_row + 8 * fragment) * int(stride);
#else
    if (EDGE) {
        return block + min(lane_row + 8 * fragment, last) * stride;
    }
    // The second term is the same for all lanes.
    return block + lane_row * stride + (8 * fragment) * stride;
#endif
}

#if DROPOUT
// A lane needs one word of each of many calls of random_words(), and other lanes the other words of the same calls. So up to
// four lanes make up to four calls, one each, and trade words. A lane's `position` among them has two bits, which are
// the bits `low` and `high` of its index.

// The call that a lane makes.
int own_call(int position, int calls) {
    return calls > 2 ? min(position, calls - 1) : position % calls;
}

// A lane has two words of its call. Afterwards it has one of them, the second one if `is_second`, of the call of the first
// and of the second of the lanes that differ in `mask`.
void trade(thread uint& first, thread uint& second, bool is_second, ushort mask) {
    const uint kept = is_second ? second : first;
    const uint got = simd_shuffle_xor(is_second ? first : second, mask);
    first = is_second ? got : kept;
    second = is_second ? kept : got;
}

// Word `position` of each call, where `words` are those of the lane's own.
uint4 own_words(uint4 words, int position, ushort low, ushort high, int calls) {
    const bool is_odd = (position & 1) != 0;
    const bool is_high = (position & 2) != 0;
    uint x = words.x;
    uint y = words.y;
    uint z = words.z;
    uint w = words.w;
    if (calls > 2) {
        trade(x, y, is_odd, low);
        trade(z, w, is_odd, low);
        trade(x, z, is_high, high);
        trade(y, w, is_high, high);
        return uint4(x, y, z, w);
    }
    x = is_high ? z : x;
    y = is_high ? w : y;
    if (calls > 1) {
        trade(x, y, is_odd, low);
        return uint4(x, y, 0, 0);
    }
    return uint4(is_odd ? y : x, 0, 0, 0);
}

// Element `at` of a few in registers.
int value_at(thread const int (&values)[ROW_FRAGMENTS], int at) {
    int value = values[0];
#pragma clang loop unroll(full)
    for (int r = 1; r < ROW_FRAGMENTS; ++r) {
        value = at == r ? values[r] : value;
    }
    return value;
}

// Random words of the keys in both columns of a lane for the query of its row: of fragment `first`, counted row by row with
// FRAGMENTS in each, and of the up to three behind it. Blocks start at multiples of 8 keys, so that a fragment is a group.
template <int FRAGMENTS>
uint4 row_words(int first, thread const int (&queries)[ROW_FRAGMENTS], int first_key, Lane lane, Place place,
                constant Sizes& sizes) {
    const int calls = min(4, ROW_FRAGMENTS * FRAGMENTS - first);
    const int position = lane.column / 2;
    const int call = first + own_call(position, calls);
    const int query = value_at(queries, call / FRAGMENTS);
    const uint4 words = random_words(query, first_key / 8 + call % FRAGMENTS, place, sizes);
    return own_words(words, position, 1, 8, calls);
}
#endif
