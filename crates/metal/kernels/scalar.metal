// Attention forward, one thread a query row, float32: the baseline that is plainly right.
//
// One threadgroup: 32 * SIMDGROUPS consecutive queries of one head of one sequence, and VALUE_CHUNK columns of v.
//   threads (32, SIMDGROUPS, 1); threadgroups (queries / threads, heads * value chunks, sequences)
// One thread: s_j = q . k_j for each visible key j in turn; p_j = exp2(s_j - maximum); out = sum p_j v_j / sum p_j
//   registers  maximum, sum         stack  out[VALUE_CHUNK]         device  q, k, v, read where they lie
// No threadgroup memory, no barriers: threads share nothing.

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_scalar(
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
    uint thread_index [[thread_index_in_threadgroup]])
{
#if PACKED
    const Place place = place_of(threadgroup_position, sizes, query_offsets, key_offsets);
#else
    const Place place = place_of(threadgroup_position, sizes);
#endif
    const int query = int(threadgroup_position.x * (32 * SIMDGROUPS) + thread_index);
    if (query >= place.query_len) {
        return;
    }
    const long query_row = long(place.query_start) + query;
    device const scalar* query_values = q + row_offset(sizes.q, place.batch, place.head, query_row);
    device const scalar* keys = k + row_offset(sizes.k, place.batch, place.key_head, place.key_start);
    device const scalar* values = v + row_offset(sizes.v, place.batch, place.key_head, place.key_start);
    const int first_column = place.value_chunk * VALUE_CHUNK;
    const int columns = min(int(VALUE_CHUNK), int(sizes.value_dim) - first_column);

    RowModifiers row;
    row.position = query + place.diagonal;
#if ALIBI
    row.slope = alibi_slopes[place.batch * sizes.alibi_batch + place.head * sizes.alibi_head] * LOG2_E;
#endif
#if BIAS
    row.bias = bias + place.batch * sizes.bias_batch + place.head * sizes.bias_head + query * sizes.bias_query;
#endif
#if SINKS
    const float sink = sinks[place.head * sizes.sinks_head];
    float maximum = sink_logit(sink);
    float sum = sink_weight(sink);
#else
    float maximum = LOWEST;
    float sum = 0.0f;
#endif
    float accumulated[VALUE_CHUNK];
    for (int column = 0; column < columns; ++column) {
        accumulated[column] = 0.0f;
    }

#if DROPOUT
    uint4 words = uint4(0u);
#endif
    const KeyRange visible = visible_keys(query, place, sizes);
    for (int key = visible.start; key < visible.end; ++key) {
        device const scalar* key_values = keys + key * sizes.k.row;
        float product = 0.0f;
        for (int i = 0; i < int(sizes.head_dim); ++i) {
            product = fma(float(query_values[i]), float(key_values[i]), product);
        }
        product *= factors.query;
#if SCORE_MODIFIED
        const float score = modified_score(product, key, row, sizes, factors);
#else
        const float score = product * factors.score;
#endif
        if (score > maximum + MAXIMUM_LAG) {
            const float correction = fast::exp2(maximum - score);
            for (int column = 0; column < columns; ++column) {
                accumulated[column] *= correction;
            }
            sum *= correction;
            maximum = score;
        }
        const float weight = fast::exp2(score - maximum);
        sum += weight;
#if DROPOUT
        if (key == visible.start || key % 8 == 0) {
            words = random_words(query, key / 8, place, sizes);
        }
        if (!is_kept(word_of(words, key), key, sizes)) {
            continue;
        }
#endif
#if BIAS
        // A key that the bias hides has no part in the result, whatever its value holds.
        if (score == HIDDEN) {
            continue;
        }
#endif
        device const scalar* value = values + key * sizes.v.row + first_column;
        for (int column = 0; column < columns; ++column) {
            accumulated[column] = fma(weight, float(value[column]), accumulated[column]);
        }
    }

    float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
#if DROPOUT
    normalizer *= factors.kept;
#endif
    device scalar* result = out + row_offset(sizes.out, place.batch, place.head, query_row) + first_column;
    for (int column = 0; column < columns; ++column) {
        result[column] = scalar(accumulated[column] * normalizer);
    }
#if LSE
    if (place.value_chunk == 0) {
        lse[place.batch * sizes.lse_batch + place.head * sizes.lse_head + query_row] = lse_bits(maximum, sum);
    }
#endif
}
