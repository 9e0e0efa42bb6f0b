// From the launch to the arguments of a kernel (specification, chapter 5.2: attributes of arguments). The driver
// appends one MSL_ENTRY per kernel; the types come from the kernel's signature.
#pragma once

namespace metal {
template <class T> struct msl_parameter_type; // a parameter that no attribute can fill stays undefined

template <class T> struct msl_pointee {
  using type = remove_const_t<T>;
  static constexpr unsigned writable = !is_const<T>::value;
  static constexpr unsigned element_bytes = sizeof(msl_scalar<type>) > 8 ? 1 : sizeof(msl_scalar<type>);
};
#define MSL_POINTER_PARAMETER(space, is_constant)                                                                      \
  template <class T> struct msl_parameter_type<space T *> {                                                            \
    static constexpr msl_parameter describe(msl_source source) {                                                       \
      return {source, is_constant, msl_pointee<T>::writable && !is_constant, msl_pointee<T>::element_bytes, 0};        \
    }                                                                                                                  \
    static MSL_INLINE space T *fill(void *pointer, const msl_position *, msl_source) { return (space T *)pointer; }               \
  };                                                                                                                   \
  template <class T> struct msl_parameter_type<space T &> {                                                            \
    static constexpr msl_parameter describe(msl_source source) {                                                       \
      return {source, is_constant, msl_pointee<T>::writable && !is_constant, msl_pointee<T>::element_bytes, sizeof(T)}; \
    }                                                                                                                  \
    static MSL_INLINE space T &fill(void *pointer, const msl_position *, msl_source) { return *(space T *)pointer; }              \
  };
MSL_POINTER_PARAMETER(device, 0)
MSL_POINTER_PARAMETER(constant, 1)
MSL_POINTER_PARAMETER(threadgroup, 0)

msl_parameter msl_type_does_not_fit_the_attribute(); // not constexpr: naming it stops the compiler

MSL_INLINE constexpr const unsigned *msl_triple(const msl_position *p, msl_source_kind kind) {
  switch (kind) {
  case MSL_THREAD_POSITION_IN_GRID: return p->thread_position_in_grid;
  case MSL_THREADGROUP_POSITION_IN_GRID: return p->threadgroup_position_in_grid;
  case MSL_THREAD_POSITION_IN_THREADGROUP: return p->thread_position_in_threadgroup;
  case MSL_THREADS_PER_GRID: return p->threads_per_grid;
  case MSL_THREADS_PER_THREADGROUP: return p->threads_per_threadgroup;
  case MSL_THREADGROUPS_PER_GRID: return p->threadgroups_per_grid;
  case MSL_THREAD_INDEX_IN_THREADGROUP: return &p->thread_index_in_threadgroup;
  case MSL_SIMDGROUP_INDEX_IN_THREADGROUP: return &p->simdgroup_index_in_threadgroup;
  case MSL_THREAD_INDEX_IN_SIMDGROUP: return &p->thread_index_in_simdgroup;
  case MSL_SIMDGROUPS_PER_THREADGROUP: return &p->simdgroups_per_threadgroup;
  default: return &p->threads_per_simdgroup;
  }
}
template <class T> MSL_INLINE T msl_position_value(const unsigned *from) {
  if constexpr (msl_components<T> == 1) {
    return (T)from[0];
  } else {
    T result;
    for (int i = 0; i < msl_components<T>; ++i) result[i] = (msl_scalar<T>)from[i];
    return result;
  }
}

// Specification, table 5.8: positions are ushort or uint, scalars or vectors; indices are scalars.
#define MSL_POSITION_PARAMETER(T)                                                                                      \
  template <> struct msl_parameter_type<T> {                                                                           \
    static constexpr msl_parameter describe(msl_source source) {                                                       \
      return source.kind == MSL_BUFFER || (msl_components<T> > 1 && source.kind >= MSL_THREAD_INDEX_IN_THREADGROUP)    \
                 ? msl_type_does_not_fit_the_attribute()                                                        \
                 : msl_parameter{source, 0, 0, 0, 0};                                                                  \
    }                                                                                                                  \
    static MSL_INLINE T fill(void *, const msl_position *position, msl_source source) {                                           \
      const unsigned *from = msl_triple(position, source.kind);                                                        \
      return msl_position_value<T>(from);                                                                              \
    }                                                                                                                  \
  };
MSL_POSITION_PARAMETER(uint)
MSL_POSITION_PARAMETER(uint2)
MSL_POSITION_PARAMETER(uint3)
MSL_POSITION_PARAMETER(ushort)
MSL_POSITION_PARAMETER(ushort2)
MSL_POSITION_PARAMETER(ushort3)

template <unsigned... I> struct msl_indices {};
template <class T, T... I> using msl_index_list = msl_indices<I...>;

template <auto Function, const msl_source *Sources, class = decltype(Function)> struct msl_shim;
template <auto Function, const msl_source *Sources, class... P> struct msl_shim<Function, Sources, void (*)(P...)> {
  static constexpr unsigned count = sizeof...(P);
  template <unsigned... I> struct table {
    static constexpr msl_parameter parameters[sizeof...(I) + 1] = {msl_parameter_type<P>::describe(Sources[I])..., {}};
    static __attribute__((no_sanitize("thread"))) void call(void *const *buffers,
                                                                        void *const *threadgroup_memory,
                                                                        const msl_position *position) {
      Function(msl_parameter_type<P>::fill(Sources[I].kind == MSL_BUFFER               ? buffers[Sources[I].index]
                                           : Sources[I].kind == MSL_THREADGROUP_MEMORY ? threadgroup_memory[Sources[I].index]
                                                                                       : nullptr,
                                           position, Sources[I])...);
    }
  };
  template <unsigned... I>
  static constexpr msl_entry make(msl_indices<I...>, const char *name, unsigned max_threads, const unsigned *array_slots,
                                  unsigned array_slot_count) {
    return {name, table<I...>::call, table<I...>::parameters, count, max_threads, array_slots, array_slot_count};
  }
  static constexpr msl_entry entry(const char *name, unsigned max_threads, const unsigned *array_slots,
                                   unsigned array_slot_count) {
    return make(__make_integer_seq<msl_index_list, unsigned, count>{}, name, max_threads, array_slots, array_slot_count);
  }
};
} // namespace metal
