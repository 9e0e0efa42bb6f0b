// Numbers of lanes and threads. MSL's lane is a bit permutation of the hardware's, chosen so that the lane map of an 8x8
// matrix on Apple GPUs is that of an accumulator and of the left operand of mma.sync (PTX ISA, chapter 9.7.14):
//
//   Apple:  row = 4 l4 + 2 l2 + l1, columns 4 l3 + 2 l0 and the next    (msl/simdgroup_matrix.h)
//   NVIDIA: row = 4 h4 + 2 h3 + h2, columns 4 h1 + 2 h0 and the next
//   hence   l4 l3 l2 l1 l0 = h4 h1 h3 h2 h0
//
// Nothing in MSL ties a lane to the hardware: a kernel cannot tell.
#pragma once

namespace metal {
MSL_INLINE constexpr uint msl_lane_of_hardware(uint h) { return (h & 17) | (h >> 1 & 6) | (h << 2 & 8); }
MSL_INLINE constexpr uint msl_hardware_lane(uint l) { return (l & 17) | (l << 1 & 12) | (l >> 2 & 2); }

MSL_INLINE uint msl_lane() { return msl_lane_of_hardware(__nvvm_read_ptx_sreg_laneid()); }
MSL_INLINE uint msl_hardware_thread() {
  return __nvvm_read_ptx_sreg_tid_x() +
         __nvvm_read_ptx_sreg_ntid_x() * (__nvvm_read_ptx_sreg_tid_y() + __nvvm_read_ptx_sreg_ntid_y() * __nvvm_read_ptx_sreg_tid_z());
}
MSL_INLINE uint msl_simdgroup() { return msl_hardware_thread() / 32; }
MSL_INLINE uint msl_thread() { return msl_simdgroup() * 32 + msl_lane(); }
MSL_INLINE constexpr uint msl_tile_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
MSL_INLINE constexpr uint msl_tile_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

MSL_INLINE constexpr bool msl_lanes_agree() {
  for (uint h = 0; h < 32; ++h) {
    uint lane = msl_lane_of_hardware(h);
    if (msl_hardware_lane(lane) != h || msl_tile_row(lane) != h / 4 || msl_tile_column(lane) != h % 4 * 2) return false;
    // shfl.sync.bfly takes a permuted mask for a permuted lane.
    for (uint mask = 0; mask < 32; ++mask)
      if (msl_hardware_lane(lane ^ mask) != (h ^ msl_hardware_lane(mask))) return false;
  }
  return true;
}
static_assert(msl_lanes_agree());
} // namespace metal
