// Atomics (specification, chapters 2.6 and 6.15): relaxed order only, as in MSL for device and threadgroup memory.
// Fibers of one process take turns, so that a plain read and write is one step; threadgroups of a dispatch do too.
#pragma once

namespace metal {
enum memory_order : int { memory_order_relaxed };
enum thread_scope : int { thread_scope_thread, thread_scope_threadgroup, thread_scope_device, thread_scope_simdgroup };

template <class T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> || is_same_v<T, bool> ||
                    is_same_v<T, ulong>,
                "atomic: int, uint, bool, float or ulong");
  T msl_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
template <> struct msl_shape<atomic_int> { using scalar = int; static constexpr int components = 1; };
template <> struct msl_shape<atomic_uint> { using scalar = uint; static constexpr int components = 1; };
template <> struct msl_shape<atomic_float> { using scalar = float; static constexpr int components = 1; };
template <> struct msl_shape<atomic_ulong> { using scalar = ulong; static constexpr int components = 1; };

// The access itself is hidden from the checker, which hears of it through msl_atomic.
#define MSL_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
template <class T, class Update> MSL_UNCHECKED T msl_atomic_update(T *place, Update update) {
  T old = *place;
  *place = update(old);
  return old;
}
template <class T> MSL_UNCHECKED T msl_atomic_get(const T *place) { return *place; }
template <class T> MSL_UNCHECKED void msl_atomic_put(T *place, T value) { *place = value; }

#define MSL_ATOMIC_MODIFY(space, name, types, expression)                                                              \
  template <class T, class V> MSL_INLINE T atomic_##name##_explicit(volatile space atomic<T> *object, V operand, memory_order) { \
    static_assert(types, "atomic_" #name ": not for this type");                                                       \
    T *place = (T *)&object->msl_value;                                                                                \
    msl_atomic(place, sizeof(T), true, true);                                                                          \
    T y = (T)operand;                                                                                                  \
    return msl_atomic_update(place, [y](T x) __attribute__((no_sanitize("thread"))) { return (T)(expression); }); \
  }
#define MSL_ATOMIC(space)                                                                                              \
  MSL_ATOMIC_MODIFY(space, fetch_add, (!is_same_v<T, bool>), x + y)                                                    \
  MSL_ATOMIC_MODIFY(space, fetch_sub, (!is_same_v<T, bool>), x - y)                                                    \
  MSL_ATOMIC_MODIFY(space, fetch_max, is_integral_v<T>, max(x, y))                                                     \
  MSL_ATOMIC_MODIFY(space, fetch_min, is_integral_v<T>, min(x, y))                                                     \
  MSL_ATOMIC_MODIFY(space, fetch_or, is_integral_v<T>, x | y)                                                          \
  MSL_ATOMIC_MODIFY(space, fetch_and, is_integral_v<T>, x &y)                                                          \
  MSL_ATOMIC_MODIFY(space, fetch_xor, is_integral_v<T>, x ^ y)                                                         \
  MSL_ATOMIC_MODIFY(space, exchange, true, y)                                                                          \
  template <class T> MSL_INLINE T atomic_load_explicit(const volatile space atomic<T> *object, memory_order) {         \
    const T *place = (const T *)&object->msl_value;                                                                    \
    msl_atomic(place, sizeof(T), true, false);                                                                         \
    return msl_atomic_get(place);                                                                                      \
  }                                                                                                                    \
  template <class T, class V>                                                                                          \
  MSL_INLINE void atomic_store_explicit(volatile space atomic<T> *object, V value, memory_order) {                     \
    T *place = (T *)&object->msl_value;                                                                                \
    msl_atomic(place, sizeof(T), false, true);                                                                         \
    msl_atomic_put(place, (T)value);                                                                                   \
  }                                                                                                                    \
  template <class T, class V>                                                                                          \
  MSL_INLINE bool atomic_compare_exchange_weak_explicit(volatile space atomic<T> *object, thread T *expected,          \
                                                        V desired, memory_order, memory_order) {                       \
    T *place = (T *)&object->msl_value;                                                                                \
    msl_atomic(place, sizeof(T), true, true);                                                                          \
    T wanted = *expected, replacement = (T)desired;                                                                    \
    *expected = msl_atomic_update(                                                                                     \
        place, [=](T x) __attribute__((no_sanitize("thread"))) { return x == wanted ? replacement : x; }); \
    return *expected == wanted;                                                                                        \
  }
MSL_FOR_MEMORY(MSL_ATOMIC)
} // namespace metal
