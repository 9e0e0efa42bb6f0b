// Functions over the lanes of a simdgroup (specification, chapter 6.9.2). All live lanes must arrive at one place;
// MSL allows a part of them, which no kernel here needs and which hides mistakes.
#pragma once

namespace metal {
template <class T> struct msl_exchange {
  T value;
  uint argument;
  T result;
};

// In the lambdas: lane[i] is the exchange of lane i, active the mask of live lanes.
#define MSL_COMBINE(name, ...)                                                                                         \
  msl_exchange<T> mine{value, (uint)argument, value};                                                                  \
  msl_simd(name, msl_line, &mine, [](void **slots, uint active) __attribute__((no_sanitize("thread"))) {   \
    auto lane = (msl_exchange<T> **)slots;                                                                             \
    __VA_ARGS__                                                                                                        \
  });                                                                                                                  \
  return mine.result;

// Reductions in a butterfly, the order of which MSL leaves open.
#define MSL_REDUCTION(name, expression)                                                                                \
  template <class T> MSL_INLINE T name(T value, MSL_LINE) {                                                            \
    static_assert(!is_same_v<T, bool>, #name ": a number is due");                                                     \
    uint argument = 0;                                                                                                 \
    MSL_COMBINE(                                                                                                       \
        #name, T part[32]; bool has[32];                                                                               \
        for (int i = 0; i < 32; ++i) if ((has[i] = active >> i & 1)) part[i] = lane[i]->value;                         \
        for (int half_width = 16; half_width; half_width >>= 1) for (int i = 0; i < half_width; ++i) {                 \
          int j = i + half_width;                                                                                      \
          if (!has[j]) continue;                                                                                       \
          if (has[i]) {                                                                                                \
            T x = part[i];                                                                                             \
            T y = part[j];                                                                                             \
            part[i] = (T)(expression);                                                                                 \
          } else {                                                                                                     \
            part[i] = part[j];                                                                                         \
            has[i] = true;                                                                                             \
          }                                                                                                            \
        } for (int i = 0; i < 32; ++i) if (active >> i & 1) lane[i]->result = part[0];)                                \
  }
MSL_REDUCTION(simd_sum, x + y)
MSL_REDUCTION(simd_product, x *y)
MSL_REDUCTION(simd_max, max(x, y))
MSL_REDUCTION(simd_min, min(x, y))
MSL_REDUCTION(simd_or, x | y)
MSL_REDUCTION(simd_and, x &y)
MSL_REDUCTION(simd_xor, x ^ y)

// A lane takes the value of lane `source`; outside of the simdgroup it keeps its own.
#define MSL_SHUFFLE(name, source_expression)                                                                           \
  template <class T> MSL_INLINE T name(T value, ushort argument, MSL_LINE) {                                           \
    MSL_COMBINE(                                                                                                       \
        #name, for (uint i = 0; i < 32; ++i) {                                                                         \
          if (!(active >> i & 1)) continue;                                                                            \
          uint distance = lane[i]->argument;                                                                           \
          uint source = source_expression;                                                                             \
          if (source < 32 && !(active >> source & 1)) {                                                                \
            msl_fail(0, #name " reads a lane that is not active");                                                     \
            return;                                                                                                    \
          }                                                                                                            \
          lane[i]->result = source < 32 ? lane[source]->value : lane[i]->value;                                        \
        })                                                                                                             \
  }
MSL_SHUFFLE(simd_shuffle, distance & 31)
MSL_SHUFFLE(simd_broadcast, distance & 31)
MSL_SHUFFLE(simd_shuffle_xor, (i ^ distance) & 31)
MSL_SHUFFLE(simd_shuffle_down, i + distance)
MSL_SHUFFLE(simd_shuffle_up, i - distance)
MSL_SHUFFLE(simd_shuffle_rotate_down, (i + distance) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (i - distance) & 31)

template <class T> MSL_INLINE T simd_broadcast_first(T value, MSL_LINE) {
  uint argument = 0;
  MSL_COMBINE(
      "simd_broadcast_first", T first = lane[__builtin_ctz(active)]->value;
      for (int i = 0; i < 32; ++i) if (active >> i & 1) lane[i]->result = first;)
}
MSL_INLINE bool simd_any(bool condition, MSL_LINE) { return simd_or((uint)condition, msl_line) != 0; }
MSL_INLINE bool simd_all(bool condition, MSL_LINE) { return simd_and((uint)condition, msl_line) != 0; }

// The mask of lanes; MSL's simd_vote is this number with methods.
struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  MSL_INLINE explicit operator vote_t() const { return bits; }
  MSL_INLINE bool all() const { return (uint)bits == ~0u; }
  MSL_INLINE bool any() const { return bits != 0; }
};
MSL_INLINE simd_vote simd_ballot(bool condition, MSL_LINE) {
  return simd_vote{simd_or(condition ? 1u << msl_lane() : 0u, msl_line)};
}
MSL_INLINE bool simd_is_first() { return msl_lane() == 0; }
MSL_INLINE simd_vote simd_active_threads_mask(MSL_LINE) { return simd_ballot(true, msl_line); }
} // namespace metal
