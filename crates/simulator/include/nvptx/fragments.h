// What the lanes of a simdgroup hold of the operands of a product, read from memory or out of cooperative tensors, and the
// instructions that multiply it.
#pragma once

namespace metal {
// One of a kind of memory as 16, 8, 4 or 2 bytes.
#define MSL_READ_AS(space)                                                                                             \
  template <class W, class T> MSL_INLINE W msl_read_as(space T *from) { return *(space const W *)from; }               \
  template <class W, class T> MSL_INLINE void msl_write_as(space T *to, W value) { *(space W *)to = value; }
MSL_FOR_MEMORY(MSL_READ_AS)

// Neighbouring elements of a row, in the words in which they lie in memory.
template <class T, int Count> struct msl_run {
  static constexpr int per_word = 4 / sizeof(T), bytes = Count * sizeof(T), words = (bytes + 3) / 4;
  uint word[words];

  // All of them, from an address that is as aligned as they are large, up to 16 bytes.
  template <class Pointer> MSL_INLINE void read(Pointer from) {
    if constexpr (bytes >= 16) {
#pragma clang loop unroll(full)
      for (int i = 0; i < words / 4; ++i) {
        const auto part = msl_read_as<vec<uint, 4>>(from + i * (16 / (int)sizeof(T)));
        for (int j = 0; j < 4; ++j) word[4 * i + j] = part[j];
      }
    } else if constexpr (bytes == 8) {
      const auto part = msl_read_as<vec<uint, 2>>(from);
      word[0] = part[0], word[1] = part[1];
    } else if constexpr (bytes == 4) {
      word[0] = msl_read_as<uint>(from);
    } else {
      word[0] = msl_read_as<ushort>(from);
    }
  }
  // Those before `end`, zeros for the others.
  template <class Pointer> MSL_INLINE void read(Pointer from, int stride, int end) {
    clear();
#pragma clang loop unroll(full)
    for (int i = 0; i < Count; ++i)
      if (i < end) set(i, from[i * (long)stride]);
  }
  // Likewise, into memory.
  template <class Pointer> MSL_INLINE void write(Pointer to) const {
    if constexpr (bytes >= 16) {
#pragma clang loop unroll(full)
      for (int i = 0; i < words / 4; ++i)
        msl_write_as(to + i * (16 / (int)sizeof(T)),
                     vec<uint, 4>{word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]});
    } else if constexpr (bytes == 8) {
      msl_write_as(to, vec<uint, 2>{word[0], word[1]});
    } else if constexpr (bytes == 4) {
      msl_write_as(to, word[0]);
    } else {
      msl_write_as(to, (ushort)word[0]);
    }
  }
  template <class Pointer> MSL_INLINE void write(Pointer to, int end) const {
#pragma clang loop unroll(full)
    for (int i = 0; i < Count; ++i)
      if (i < end) to[i] = get(i);
  }
  MSL_INLINE void clear() {
    for (int i = 0; i < words; ++i) word[i] = 0;
  }
  MSL_INLINE T get(int i) const {
    if constexpr (sizeof(T) == 4) return __builtin_bit_cast(T, word[i]);
    else return __builtin_bit_cast(T, (ushort)(word[i / per_word] >> i % per_word * 16));
  }
  MSL_INLINE void set(int i, T value) {
    if constexpr (sizeof(T) == 4) word[i] = __builtin_bit_cast(uint, value);
    else word[i / per_word] |= (uint)__builtin_bit_cast(ushort, value) << i % per_word * 16;
  }
};

enum class msl_unit { halves, bfloats, tf32 };
template <class L, class R>
constexpr constant msl_unit msl_unit_of = is_same_v<L, half> && is_same_v<R, half>       ? msl_unit::halves
                                          : is_same_v<L, bfloat> && is_same_v<R, bfloat> ? msl_unit::bfloats
                                                                                         : msl_unit::tf32;

// Two neighbours along the contraction as a unit takes them. Split: a float is the sum of two tf32 numbers; otherwise the
// unit ignores the bits that tf32 has not, and 16-bit numbers are tf32 numbers.
template <msl_unit Unit, bool Split> struct msl_pair { uint bits; };
template <bool Split> struct msl_pair<msl_unit::tf32, Split> {
  uint high[2];
  uint low[2];
};
template <msl_unit Unit, bool Split, class T> MSL_INLINE msl_pair<Unit, Split> msl_make_pair(T first, T second) {
  msl_pair<Unit, Split> pair;
  if constexpr (Unit != msl_unit::tf32) {
    pair.bits = __builtin_bit_cast(uint, (vec<T, 2>{first, second}));
  } else {
    const float values[] = {(float)first, (float)second};
    for (int e = 0; e < 2; ++e) {
      if constexpr (Split) msl_split(values[e], pair.high[e], pair.low[e]);
      else pair.high[e] = __builtin_bit_cast(uint, values[e]);
    }
  }
  return pair;
}
// Elements 2 i and 2 i + 1 of a row.
template <msl_unit Unit, bool Split, class T, int Count>
MSL_INLINE msl_pair<Unit, Split> msl_pair_of(thread const msl_run<T, Count> &run, int i) {
  if constexpr (Unit != msl_unit::tf32) return {run.word[i]};
  else return msl_make_pair<Unit, Split>(run.get(2 * i), run.get(2 * i + 1));
}
// Element i of two rows.
template <msl_unit Unit, bool Split, class T, int Count>
MSL_INLINE msl_pair<Unit, Split> msl_pair_of(thread const msl_run<T, Count> &first, thread const msl_run<T, Count> &second,
                                             int i) {
  if constexpr (Unit != msl_unit::tf32) return {msl_interleaved(first.word[i / 2], second.word[i / 2], i % 2 != 0)};
  else return msl_make_pair<Unit, Split>(first.get(i), second.get(i));
}

// sum += left right over Tiles tiles of the contraction: rows g and g + 8 of left, columns 2 t and 2 t + 1 of the result.
template <msl_unit Unit, bool SplitLeft, bool SplitRight, int Tiles>
MSL_INLINE void msl_multiply_tiles(thread float (&sum)[4], thread const msl_pair<Unit, SplitLeft> (&left)[Tiles][2],
                                   thread const msl_pair<Unit, SplitRight> (&right)[Tiles]) {
  if constexpr (Unit == msl_unit::tf32) {
#pragma clang loop unroll(full)
    for (int i = 0; i < Tiles; ++i) {
      // The small products first.
      if constexpr (SplitLeft && SplitRight) msl_mma_tf32(sum, left[i][0].low, left[i][1].low, right[i].low);
      if constexpr (SplitLeft) msl_mma_tf32(sum, left[i][0].low, left[i][1].low, right[i].high);
      if constexpr (SplitRight) msl_mma_tf32(sum, left[i][0].high, left[i][1].high, right[i].low);
      msl_mma_tf32(sum, left[i][0].high, left[i][1].high, right[i].high);
    }
  } else if constexpr (Tiles == 1) {
    if constexpr (Unit == msl_unit::halves) msl_mma_half(sum, left[0][0].bits, left[0][1].bits, right[0].bits);
    else msl_mma_bfloat(sum, left[0][0].bits, left[0][1].bits, right[0].bits);
  } else {
#pragma clang loop unroll(full)
    for (int i = 0; i < Tiles; i += 2) {
      const uint upper[] = {left[i][0].bits, left[i + 1][0].bits}, lower[] = {left[i][1].bits, left[i + 1][1].bits};
      const uint columns[] = {right[i].bits, right[i + 1].bits};
      if constexpr (Unit == msl_unit::halves) msl_mma_half(sum, upper, lower, columns);
      else msl_mma_bfloat(sum, upper, lower, columns);
    }
  }
}
} // namespace metal
