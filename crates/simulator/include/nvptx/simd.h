// Functions over the lanes of a simdgroup (specification, chapter 6.9.2) as shfl.sync and vote.sync. All 32 lanes must
// take part.
#pragma once

namespace metal {
// Moves a value of any size, 32 bits at a time, with `move` from a lane's word to another lane's.
template <class T, class Move> MSL_INLINE T msl_exchange(T value, Move move) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(T, move(__builtin_bit_cast(int, value)));
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(T, (short)move((int)__builtin_bit_cast(short, value)));
  } else if constexpr (sizeof(T) == 1) {
    return __builtin_bit_cast(T, (char)move((int)__builtin_bit_cast(char, value)));
  } else {
    struct words { int word[sizeof(T) / 4]; } bits = __builtin_bit_cast(words, value);
    for (int &word : bits.word) word = move(word);
    return __builtin_bit_cast(T, bits);
  }
}

template <class T> MSL_INLINE T simd_shuffle(T value, ushort lane) {
  int from = (int)msl_hardware_lane(lane & 31);
  return msl_exchange(value, [=](int word) { return __nvvm_shfl_sync_idx_i32(~0u, word, from, 31); });
}
// The permutation of lanes is linear, so that it maps the mask as it maps the lanes.
template <class T> MSL_INLINE T simd_shuffle_xor(T value, ushort mask) {
  int across = (int)msl_hardware_lane(mask & 31);
  return msl_exchange(value, [=](int word) { return __nvvm_shfl_sync_bfly_i32(~0u, word, across, 31); });
}
template <class T> MSL_INLINE T simd_broadcast(T value, ushort lane) { return simd_shuffle(value, lane); }
template <class T> MSL_INLINE T simd_broadcast_first(T value) { return simd_shuffle(value, 0); }
// Outside of the simdgroup a lane keeps its own value.
template <class T> MSL_INLINE T simd_shuffle_down(T value, ushort distance) {
  uint lane = msl_lane(), from = lane + distance;
  return simd_shuffle(value, (ushort)(from < 32 ? from : lane));
}
template <class T> MSL_INLINE T simd_shuffle_up(T value, ushort distance) {
  uint lane = msl_lane();
  return simd_shuffle(value, (ushort)(distance <= lane ? lane - distance : lane));
}
template <class T> MSL_INLINE T simd_shuffle_rotate_down(T value, ushort distance) {
  return simd_shuffle(value, (ushort)(msl_lane() + distance & 31));
}
template <class T> MSL_INLINE T simd_shuffle_rotate_up(T value, ushort distance) {
  return simd_shuffle(value, (ushort)(msl_lane() - distance & 31));
}

#define MSL_REDUCTION(name, expression)                                                                                \
  template <class T> MSL_INLINE T name(T x) {                                                                          \
    for (int across = 16; across > 0; across /= 2) {                                                                   \
      T y = simd_shuffle_xor(x, (ushort)across);                                                                       \
      x = (T)(expression);                                                                                             \
    }                                                                                                                  \
    return x;                                                                                                          \
  }
MSL_REDUCTION(simd_sum, x + y)
MSL_REDUCTION(simd_product, x *y)
MSL_REDUCTION(simd_max, max(x, y))
MSL_REDUCTION(simd_min, min(x, y))
MSL_REDUCTION(simd_or, x | y)
MSL_REDUCTION(simd_and, x &y)
MSL_REDUCTION(simd_xor, x ^ y)
MSL_INLINE bool simd_any(bool condition) { return __nvvm_vote_any_sync(~0u, condition); }
MSL_INLINE bool simd_all(bool condition) { return __nvvm_vote_all_sync(~0u, condition); }

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  MSL_INLINE explicit operator vote_t() const { return bits; }
  MSL_INLINE bool all() const { return (uint)bits == ~0u; }
  MSL_INLINE bool any() const { return bits != 0; }
};
MSL_INLINE simd_vote simd_ballot(bool condition) { return simd_vote{simd_or(condition ? 1u << msl_lane() : 0u)}; }
MSL_INLINE bool simd_is_first() { return msl_lane() == 0; }
} // namespace metal
