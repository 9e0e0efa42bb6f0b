// What the kernels of attention with few queries share: their sizes, and where partial results lie.
//
// Row i of a key head is query i / group of query head key_head * group + i % group: heads that share keys are neighbours,
// and later rows are no earlier queries. Partial results of a split of the keys are float32, of each query (token) and
// query head: what was summed under 2^maximum. All states come first, then all values:
//   [splits, tokens, query heads] (maximum, sum)        [splits, tokens, query heads, VALUE_DIM] values

// The int64 list of a launch, in the order of decode.rs.
struct DecodeSizes {
    Sizes forward;
    long query_heads;
    long splits;  // parts of the keys of a sequence, each the work of other threadgroups
    CacheSizes cache;
};

// What a row saw of one split. One without keys has a sum of 0, and its values were never written.
typedef float2 SplitState;

// Where the state of a query (of a place) and head lies for split 0.
long state_at(Place place, int query, int head, constant DecodeSizes& sizes) {
#if PACKED
    const long token = place.query_start + query;
#else
    const long token = place.batch * sizes.forward.query_len + query;
#endif
    return token * sizes.query_heads + head;
}

// States of one split.
long state_count(constant DecodeSizes& sizes) {
    return sizes.forward.query_rows * sizes.query_heads;
}

// Queries of a place that have threadgroups: nobody has looked at the offsets of a packed batch.
int counted_queries(Place place, constant DecodeSizes& sizes) {
    return min(place.query_len, int(sizes.forward.query_len));
}
