// Arrays in threadgroup memory: one variable in shared memory each, aligned for the widest accesses.
#pragma once

namespace {
template <class T, unsigned Slot> struct msl_threadgroup_storage {
  static __attribute__((aligned(16))) threadgroup T variable;
  static MSL_INLINE threadgroup T &array() { return variable; }
};
template <class T, unsigned Slot> threadgroup T msl_threadgroup_storage<T, Slot>::variable;
} // namespace
