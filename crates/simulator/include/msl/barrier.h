// Barriers and memory flags (specification, chapter 6.9.1). mem_none orders no memory: it is counted as a hint, and
// what lies on its two sides races all the same.
#pragma once

// The compiler must not carry memory over a point where other threads run.
#define MSL_FENCE asm volatile("" ::: "memory")

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

MSL_INLINE void threadgroup_barrier(mem_flags flags, MSL_LINE) {
  MSL_FENCE;
  msl_threadgroup_barrier((uint)flags, msl_line);
  MSL_FENCE;
}
MSL_INLINE void simdgroup_barrier(mem_flags flags, MSL_LINE) {
  MSL_FENCE;
  msl_simdgroup_barrier((uint)flags, msl_line);
  MSL_FENCE;
}
} // namespace metal
