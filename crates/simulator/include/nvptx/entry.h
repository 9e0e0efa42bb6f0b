// From the launch to the arguments of a kernel (specification, chapter 5.2). The driver appends one entry point per
// kernel, whose only parameter is the table of buffers.
#pragma once

#include "msl/source.h"

// Addresses in device memory, by [[buffer(n)]]; Metal has 31 of them.
struct msl_buffers {
  ulong address[31];
};

namespace metal {
// The lanes of a warp lie along x: a threadgroup is a multiple of 32 threads wide, or one of one row.
MSL_INLINE uint3 msl_thread_position() {
  uint x = __nvvm_read_ptx_sreg_tid_x();
  return uint3{(x & ~31u) + msl_lane_of_hardware(x & 31), __nvvm_read_ptx_sreg_tid_y(), __nvvm_read_ptx_sreg_tid_z()};
}
MSL_INLINE uint3 msl_threads_per_threadgroup() {
  return uint3{__nvvm_read_ptx_sreg_ntid_x(), __nvvm_read_ptx_sreg_ntid_y(), __nvvm_read_ptx_sreg_ntid_z()};
}
MSL_INLINE uint3 msl_threadgroup_position() {
  return uint3{__nvvm_read_ptx_sreg_ctaid_x(), __nvvm_read_ptx_sreg_ctaid_y(), __nvvm_read_ptx_sreg_ctaid_z()};
}
MSL_INLINE uint3 msl_threadgroups_per_grid() {
  return uint3{__nvvm_read_ptx_sreg_nctaid_x(), __nvvm_read_ptx_sreg_nctaid_y(), __nvvm_read_ptx_sreg_nctaid_z()};
}
MSL_INLINE uint msl_threads() {
  uint3 threads = msl_threads_per_threadgroup();
  return threads.x * threads.y * threads.z;
}
template <msl_source_kind Kind> MSL_INLINE uint3 msl_position() {
  if constexpr (Kind == MSL_THREAD_POSITION_IN_GRID)
    return msl_threadgroup_position() * msl_threads_per_threadgroup() + msl_thread_position();
  else if constexpr (Kind == MSL_THREADGROUP_POSITION_IN_GRID) return msl_threadgroup_position();
  else if constexpr (Kind == MSL_THREAD_POSITION_IN_THREADGROUP) return msl_thread_position();
  else if constexpr (Kind == MSL_THREADS_PER_GRID) return msl_threadgroups_per_grid() * msl_threads_per_threadgroup();
  else if constexpr (Kind == MSL_THREADS_PER_THREADGROUP) return msl_threads_per_threadgroup();
  else if constexpr (Kind == MSL_THREADGROUPS_PER_GRID) return msl_threadgroups_per_grid();
  else if constexpr (Kind == MSL_THREAD_INDEX_IN_THREADGROUP) return uint3{msl_thread()};
  else if constexpr (Kind == MSL_SIMDGROUP_INDEX_IN_THREADGROUP) return uint3{msl_simdgroup()};
  else if constexpr (Kind == MSL_THREAD_INDEX_IN_SIMDGROUP) return uint3{msl_lane()};
  else if constexpr (Kind == MSL_SIMDGROUPS_PER_THREADGROUP) return uint3{(msl_threads() + 31) / 32};
  else {
    static_assert(Kind == MSL_THREADS_PER_SIMDGROUP, "[[threadgroup(n)]] arguments are not translated");
    return uint3{32};
  }
}

template <class T> struct msl_parameter_type {
  template <msl_source Source> static MSL_INLINE T fill(thread const msl_buffers &) {
    const uint3 position = msl_position<Source.kind>();
    if constexpr (msl_components<T> == 1) {
      return (T)position.x;
    } else {
      T result;
      for (int i = 0; i < msl_components<T>; ++i) result[i] = (msl_scalar<T>)position[i];
      return result;
    }
  }
};
#define MSL_POINTER_PARAMETER(space)                                                                                   \
  template <class T> struct msl_parameter_type<space T *> {                                                            \
    template <msl_source Source> static MSL_INLINE space T *fill(thread const msl_buffers &buffers) {                  \
      static_assert(Source.kind == MSL_BUFFER);                                                                        \
      return (space T *)buffers.address[Source.index];                                                                 \
    }                                                                                                                  \
  };                                                                                                                   \
  template <class T> struct msl_parameter_type<space T &> {                                                            \
    template <msl_source Source> static MSL_INLINE space T &fill(thread const msl_buffers &buffers) {                  \
      static_assert(Source.kind == MSL_BUFFER);                                                                        \
      return *(space T *)buffers.address[Source.index];                                                                \
    }                                                                                                                  \
  };
MSL_POINTER_PARAMETER(device)
MSL_POINTER_PARAMETER(constant)

template <unsigned... I> struct msl_indices {};
template <class T, T... I> using msl_index_list = msl_indices<I...>;

template <auto Function, const msl_source *Sources, class = decltype(Function)> struct msl_shim;
template <auto Function, const msl_source *Sources, class... P> struct msl_shim<Function, Sources, void (*)(P...)> {
  template <unsigned... I> static MSL_INLINE void call(thread const msl_buffers &buffers, msl_indices<I...>) {
    Function(msl_parameter_type<P>::template fill<Sources[I]>(buffers)...);
  }
  static MSL_INLINE void call(thread const msl_buffers &buffers) {
    call(buffers, __make_integer_seq<msl_index_list, unsigned, sizeof...(P)>{});
  }
};
} // namespace metal
