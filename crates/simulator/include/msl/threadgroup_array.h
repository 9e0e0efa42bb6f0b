// An array in threadgroup memory: the driver turns its declaration into a reference to where the runtime laid it.
#pragma once

template <class T> struct msl_innermost { using type = T; };
template <class T, unsigned long N> struct msl_innermost<T[N]> : msl_innermost<T> {};
template <class T, unsigned Slot> struct msl_threadgroup_storage {
  static constexpr unsigned element_bytes = sizeof(metal::msl_scalar<typename msl_innermost<T>::type>);
  static inline int registered = msl_register_array(Slot, sizeof(T), alignof(T), element_bytes);
  static MSL_INLINE threadgroup T &array() {
    (void)registered;
    return *(threadgroup T *)msl_threadgroup_array(Slot);
  }
};
