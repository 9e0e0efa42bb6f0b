// What the backward pass needs of every query: its LSE in units of log2, and delta = rowsum(dO * O) - dLSE.
//
// One threadgroup: 8 * SIMDGROUPS consecutive queries of one head of one sequence; four lanes a query.
//   threads (32, SIMDGROUPS, 1); threadgroups (queries / rows, heads, sequences)
// Everything lives in registers; no barrier. A query that sees nothing gets an LSE so high that all its weights are 0.

kernel void attention_backward_delta(
    device const scalar* out [[buffer(3)]],
    device const float* lse [[buffer(4)]],
#if PACKED
    device const int* query_offsets [[buffer(5)]],
    device const int* key_offsets [[buffer(6)]],
#endif
    device const scalar* d_out [[buffer(9)]],
#if LSE_GRADIENT
    device const float* d_lse [[buffer(10)]],
#endif
    device RowState* states [[buffer(11)]],
    constant BackwardSizes& sizes [[buffer(15)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
#if PACKED
    const Place place = place_of(threadgroup_position, sizes.forward, query_offsets, key_offsets);
#else
    const Place place = place_of(threadgroup_position, sizes.forward);
#endif
    const int lane = int(lane_index);
    const int query = (int(threadgroup_position.x) * SIMDGROUPS + int(simdgroup_index)) * 8 + lane / 4;
    // Lanes past the end compute the last query again and do not store it: all take part in the shuffles.
    const long row = min(query, place.query_len - 1);
    if (place.query_len == 0) {
        return;
    }
    device const scalar* result = out + row_offset(sizes.forward.out, place.batch, place.head, place.query_start)
        + row * sizes.forward.out.row;
    device const scalar* gradient = d_out + row_offset(sizes.d_out, place.batch, place.head, place.query_start)
        + row * sizes.d_out.row;
    float delta = 0.0f;
    for (int i = lane % 4; i < (VALUE_DIM + 3) / 4; i += 4) {
        const float4 a = float4(four_of<VALUE_DIM % 4 == 0>(result, i, VALUE_DIM));
        const float4 b = float4(four_of<VALUE_DIM % 4 == 0>(gradient, i, VALUE_DIM));
        delta = fma(a[0], b[0], delta);
        delta = fma(a[1], b[1], delta);
        delta = fma(a[2], b[2], delta);
        delta = fma(a[3], b[3], delta);
    }
    delta += simd_shuffle_xor(delta, 1);
    delta += simd_shuffle_xor(delta, 2);
    if (query < place.query_len && lane % 4 == 0) {
        const long at = place.batch * sizes.forward.lse_batch + place.head * sizes.forward.lse_head + place.query_start + query;
        const float natural = lse[at];
#if LSE_GRADIENT
        delta -= d_lse[at];
#endif
        // Negative infinity: callers who merge results begin with it.
        const bool sees_nothing = (as_type<uint>(natural) & 0x7fffffffu) == POSITIVE_INFINITY;
        states[at] = sees_nothing ? RowState(-LOWEST, 0.0f) : RowState(natural * LOG2_E, delta);
    }
}
