// Barriers (specification, chapter 6.9.1) as PTX's bar.sync and bar.warp.sync, which order all memory that the
// participants share whatever the flags are. simdgroup_barrier(mem_none) orders nothing in MSL either: a hint.
#pragma once

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((uint)a & (uint)b); }

MSL_INLINE void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_INLINE void simdgroup_barrier(mem_flags flags) {
  if (flags != mem_flags::mem_none) __nvvm_bar_warp_sync(~0u);
}
} // namespace metal
