// What every attention kernel shares: the parameter block, the visible keys of a row and the score of a query and a key.
//
// Scores are kept in units of log2, so that the softmax is fast::exp2 of a difference. A hidden key has the score HIDDEN
// and a running maximum starts at LOWEST: exp2(HIDDEN - maximum) is then 0 whatever a row has seen so far, and no
// infinity takes part in the arithmetic. Infinities that must be told apart are compared as bit patterns, which a
// compiler may not assume away in any math mode.

constant constexpr float HIDDEN = -1.7014118346046923e38f;  // -2**127
constant constexpr float LOWEST = -8.507059173023462e37f;   // -2**126
// A running maximum follows the true one only once that is this much higher (a factor of 256 in the weights, which
// float and half hold with ease), so that accumulated outputs are seldom rescaled. Cf. FlashAttention-4.
constant constexpr float MAXIMUM_LAG = 8.0f;
constant constexpr float LN_2 = 0.693147180559945309f;
constant constexpr float LOG2_E = 1.44269504088896341f;
constant constexpr uint POSITIVE_INFINITY = 0x7f800000u;
constant constexpr uint NEGATIVE_INFINITY = 0xff800000u;

// Distances in elements between neighbouring sequences (0 when packed), rows and heads.
struct Strides {
    long batch;
    long row;
    long head;
};

// The int64 list of a launch, in the order of launch.rs.
struct Sizes {
    long query_len;     // of a packed batch: of its longest sequence
    long key_len;
    long query_rows;    // of all sequences of a packed batch
    long key_rows;
    long head_dim;
    long value_dim;
    long group;         // query heads that share a key head
    long value_chunks;  // threadgroups that share the columns of v
    long window_left;
    long window_right;
    long top_left;      // 1: the diagonal starts at the first key, 0: it ends at the last
    Strides q;
    Strides k;
    Strides v;
    Strides out;
    long lse_batch;
    long lse_head;
    long alibi_batch;
    long alibi_head;
    long bias_batch;
    long bias_head;
    long bias_query;
    long bias_key;
    long sinks_head;
    long query_heads;
    long dropout_threshold;  // the 16 bits of a dropped key are below it
    long dropout_seed;
    long dropout_offset;
};

// The float32 list of a launch.
struct Factors {
    float query;    // 1 or -1, the sign of the softmax scale
    float score;    // |scale| * log2(e), or |scale| / softcap
    float softcap;  // softcap * log2(e)
    float kept;     // what dropout multiplies kept weights by
};

#if BIAS_BOOLEAN
typedef uchar bias_scalar;
#elif BIAS_FLOAT
typedef float bias_scalar;
#elif BIAS_HALF
typedef half bias_scalar;
#elif BIAS_BFLOAT
typedef bfloat bias_scalar;
#endif

// One sequence of the batch, and the head of it, that a threadgroup works on.
struct Place {
    int batch;
    int head;
    int key_head;
    int value_chunk;
    int query_start;  // row of q where the sequence starts; 0 unless packed, where the batch stride is 0
    int query_len;
    int key_start;
    int key_len;
    int diagonal;     // position of query 0 on the key axis
};

// Keys start <= j < end.
struct KeyRange {
    int start;
    int end;
};

Place place_of(uint3 threadgroup_position, constant Sizes& sizes
#if PACKED
    , device const int* query_offsets, device const int* key_offsets
#endif
) {
    Place place;
    place.batch = int(threadgroup_position.z);
    place.head = int(threadgroup_position.y) / int(sizes.value_chunks);
    place.value_chunk = int(threadgroup_position.y) % int(sizes.value_chunks);
    place.key_head = place.head / int(sizes.group);
#if PACKED
    // Nobody has looked at the offsets: what they claim beyond the tensors is cut off.
    const int query_rows = int(sizes.query_rows);
    const int key_rows = int(sizes.key_rows);
    place.query_start = clamp(query_offsets[place.batch], 0, query_rows);
    place.query_len = clamp(query_offsets[place.batch + 1], place.query_start, query_rows) - place.query_start;
    place.key_start = clamp(key_offsets[place.batch], 0, key_rows);
    place.key_len = clamp(key_offsets[place.batch + 1], place.key_start, key_rows) - place.key_start;
#else
    place.query_start = 0;
    place.query_len = int(sizes.query_len);
    place.key_start = 0;
    place.key_len = int(sizes.key_len);
#endif
    place.diagonal = sizes.top_left != 0 ? 0 : place.key_len - place.query_len;
    return place;
}

// The inclusive window of flash_attn: diagonal - left <= j <= diagonal + right. Both ends never decrease with the query.
KeyRange visible_keys(int query, Place place, constant Sizes& sizes) {
    KeyRange range = {0, place.key_len};
#if WINDOW_LEFT
    range.start = clamp(query + place.diagonal - int(sizes.window_left), 0, place.key_len);
#endif
#if WINDOW_RIGHT
    range.end = clamp(query + place.diagonal + int(sizes.window_right) + 1, range.start, place.key_len);
#endif
    return range;
}

// Element 0 of a row of a head of q or out; of k or v with their head and start.
long row_offset(constant Strides& strides, int batch, int head, long row) {
    return batch * strides.batch + head * strides.head + row * strides.row;
}

bool is_negative_infinity(float x) {
    return as_type<uint>(x) == NEGATIVE_INFINITY;
}

// Bits of the natural-log LSE of a row; of +inf when nothing was summed.
uint lse_bits(float maximum, float sum) {
    const float lse = (maximum + precise::log2(sum)) * LN_2;
    return sum == 0.0f ? POSITIVE_INFINITY : as_type<uint>(lse);
}

#if SINKS
// A sink is one more logit of the head, without a value. One below LOWEST would break the rule for HIDDEN.
float sink_logit(float sink) {
    return is_negative_infinity(sink) || sink * LOG2_E < LOWEST ? LOWEST : sink * LOG2_E;
}

float sink_weight(float sink) {
    return is_negative_infinity(sink) || sink * LOG2_E < LOWEST ? 0.0f : 1.0f;
}
#endif

// What a row's scores need besides its products.
struct RowModifiers {
    int position;  // of the query on the key axis
#if ALIBI
    float slope;   // times log2(e)
#endif
#if BIAS
    device const bias_scalar* bias;  // of key 0
#endif
};

#if SOFTCAP
// How near a score is to the softcap, from -1 to 1. fast::tanh is unbounded by the specification, and has been seen to
// return NaN for large arguments.
float saturation(float product, constant Factors& factors) {
    return precise::tanh(product * factors.score);
}
#endif

#if SCORE_MODIFIED
// Score of a visible key in units of log2: softcap, then ALiBi, then bias or boolean mask.
float modified_score(float product, int key, RowModifiers row, constant Sizes& sizes, constant Factors& factors) {
#if SOFTCAP
    float score = factors.softcap * saturation(product, factors);
#else
    float score = product * factors.score;
#endif
#if ALIBI
    score = fma(-row.slope, float(abs(key - row.position)), score);
#endif
#if BIAS_BOOLEAN
    score = row.bias[key * sizes.bias_key] != 0 ? score : HIDDEN;
#elif BIAS
    const float bias = float(row.bias[key * sizes.bias_key]);
    score = is_negative_infinity(bias) ? HIDDEN : fma(bias, LOG2_E, score);
#endif
    return score;
}
#endif

#if DROPOUT
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) for the keys 8 * group to
// 8 * group + 7 of a query, by the rule of crates/core/src/dropout.rs: a word has the bits of two keys.
uint4 random_words(int query, int group, Place place, constant Sizes& sizes) {
    const uint head = uint(place.batch * sizes.query_heads + place.head);
    uint4 words = uint4(uint(group), uint(query), head, uint(sizes.dropout_offset));
    uint low = uint(sizes.dropout_seed);
    uint high = uint(ulong(sizes.dropout_seed) >> 32) ^ uint(ulong(sizes.dropout_offset) >> 32);
#pragma clang loop unroll(full)
    for (int round = 0; round < 10; ++round) {
        words = uint4(mulhi(words.z, 0xcd9e8d57u) ^ words.y ^ low, words.z * 0xcd9e8d57u,
                      mulhi(words.x, 0xd2511f53u) ^ words.w ^ high, words.x * 0xd2511f53u);
        low += 0x9e3779b9u;
        high += 0xbb67ae85u;
    }
    return words;
}

// The word of a group that has the bits of a key.
uint word_of(uint4 words, int key) {
    return (key & 4) != 0 ? ((key & 2) != 0 ? words.w : words.z) : ((key & 2) != 0 ? words.y : words.x);
}

// Whether a key is kept, by its word.
bool is_kept(uint word, int key, constant Sizes& sizes) {
    const uint bits = (key & 1) != 0 ? word >> 16 : word & 0xffffu;
    return bits >= uint(sizes.dropout_threshold);
}
#endif
