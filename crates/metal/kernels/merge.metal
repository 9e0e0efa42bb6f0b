// One result of the partial results that the splits of decode.metal left; their places are in splits.metal.
//
// One threadgroup: SIMDGROUPS rows (a query and a head) of one sequence, one a simdgroup; a lane has COLUMNS columns of v,
// 32 apart.   threads (32, SIMDGROUPS, 1); threadgroups (rows / SIMDGROUPS, columns / (32 * COLUMNS), sequences)
//   out = sum 2^(maximum_s - maximum) values_s / sum, sum = sum 2^(maximum_s - maximum) sum_s, over the splits s in order
// Everything lives in registers; no barriers. A split without keys is not read but for its state.

constant constexpr int COLUMNS = 4;

kernel void attention_merge(
    device scalar* out [[buffer(3)]],
#if LSE
    device uint* lse [[buffer(4)]],
#endif
#if PACKED
    device const int* query_offsets [[buffer(5)]],
#endif
    device const float* partials [[buffer(10)]],
    constant DecodeSizes& sizes [[buffer(15)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
    const uint3 sequence = uint3(0, 0, threadgroup_position.z);
#if PACKED
    const Place place = place_of(sequence, sizes.forward, query_offsets, query_offsets);  // of queries only
#else
    const Place place = place_of(sequence, sizes.forward);
#endif
    const int heads = int(sizes.query_heads);
    const int row = int(threadgroup_position.x) * SIMDGROUPS + int(simdgroup_index);
    if (row >= counted_queries(place, sizes) * heads) {
        return;
    }
    const int query = row / heads;
    const int head = row % heads;
    const int value_dim = int(sizes.forward.value_dim);
    const int first_column = int(threadgroup_position.y) * (32 * COLUMNS) + int(lane_index);
    const int splits = int(sizes.splits);

    const long count = state_count(sizes);
    device const SplitState* states = (device const SplitState*)partials + state_at(place, query, head, sizes);
    device const float* values = partials + (splits * count) * 2 + state_at(place, query, head, sizes) * value_dim;

    float maximum = LOWEST;
    for (int split = 0; split < splits; ++split) {
        maximum = max(maximum, states[split * count][0]);
    }
    float sum = 0.0f;
    float merged[COLUMNS] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int split = 0; split < splits; ++split) {
        const SplitState state = states[split * count];
        if (state[1] == 0.0f) {
            continue;
        }
        const float weight = fast::exp2(state[0] - maximum);
        sum = fma(state[1], weight, sum);
        device const float* partial = values + split * count * value_dim;
#pragma clang loop unroll(full)
        for (int i = 0; i < COLUMNS; ++i) {
            const int column = first_column + 32 * i;
            if (column < value_dim) {
                merged[i] = fma(partial[column], weight, merged[i]);
            }
        }
    }

    const float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
    device scalar* result = out + row_offset(sizes.forward.out, place.batch, head, place.query_start + query);
#pragma clang loop unroll(full)
    for (int i = 0; i < COLUMNS; ++i) {
        const int column = first_column + 32 * i;
        if (column < value_dim) {
            result[column] = scalar(merged[i] * normalizer);
        }
    }
#if LSE
    if (threadgroup_position.y == 0 && lane_index == 0) {
        lse[place.batch * sizes.forward.lse_batch + head * sizes.forward.lse_head + place.query_start + query] =
            lse_bits(maximum, sum);
    }
#endif
}
