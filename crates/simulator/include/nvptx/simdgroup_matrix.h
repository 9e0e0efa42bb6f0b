// simdgroup_matrix (specification, chapters 2.4 and 6.7) on mma.sync m16n8k8 with float accumulators.
//
// An 8x8 product is the upper half of a 16x8 one. Result, addend and left operand lie in the lanes as they do on Apple
// GPUs (lane.h); the right operand is wanted transposed and is turned by movmatrix. The lower half has rows of zeros,
// but for float operands, whose low parts go there.
//
// Float operands, MSL_FLOAT_PRODUCTS:
//   2  x = high + low, both tf32, which leaves at most 2^-23 |x|: all four products are summed
//   1  x is rounded to tf32: one instruction, as on GPUs whose matrix units take float and half at one rate
// Half and bfloat are exact in either.
#pragma once

namespace metal {
template <class T, int Columns, int Rows> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup_matrix: 8x8 is the only size");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>,
                "simdgroup_matrix: the elements are float, half or bfloat");
  using storage_type = vec<T, 2>;

  MSL_INLINE simdgroup_matrix() = default;
  MSL_INLINE explicit simdgroup_matrix(T diagonal) {
    int offset = (int)msl_tile_row(msl_lane()) - (int)msl_tile_column(msl_lane());
    m_elements = storage_type{offset == 0 ? diagonal : T(0), offset == 1 ? diagonal : T(0)};
  }
  MSL_INLINE thread storage_type &thread_elements() { return m_elements; }
  MSL_INLINE thread const storage_type &thread_elements() const { return m_elements; }

private:
  storage_type m_elements;
};

typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = Columns>
MSL_INLINE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.thread_elements() = vec<T, 2>{value, value};
  return result;
}
template <class T, int Columns, int Rows = Columns>
MSL_INLINE simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, Columns, Rows>(value);
}

#define MSL_LOAD(space)                                                                                                \
  template <class T>                                                                                                   \
  MSL_INLINE void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &result, space const T *source,                      \
                                 ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0}, bool transpose = false) {   \
    ulong row = msl_tile_row(msl_lane()), column = msl_tile_column(msl_lane());                                        \
    space const T *corner = source + origin.y * elements_per_row + origin.x;                                           \
    if (transpose) {                                                                                                   \
      result.thread_elements()[0] = corner[column * elements_per_row + row];                                           \
      result.thread_elements()[1] = corner[(column + 1) * elements_per_row + row];                                     \
    } else {                                                                                                           \
      result.thread_elements()[0] = corner[row * elements_per_row + column];                                           \
      result.thread_elements()[1] = corner[row * elements_per_row + column + 1];                                       \
    }                                                                                                                  \
  }
MSL_FOR_READABLE(MSL_LOAD)

#define MSL_STORE(space)                                                                                               \
  template <class T>                                                                                                   \
  MSL_INLINE void simdgroup_store(thread const simdgroup_matrix<T, 8, 8> &source, space T *destination,                \
                                  ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0}, bool transpose = false) {  \
    ulong row = msl_tile_row(msl_lane()), column = msl_tile_column(msl_lane());                                        \
    space T *corner = destination + origin.y * elements_per_row + origin.x;                                            \
    if (transpose) {                                                                                                   \
      corner[column * elements_per_row + row] = source.thread_elements()[0];                                           \
      corner[(column + 1) * elements_per_row + row] = source.thread_elements()[1];                                     \
    } else {                                                                                                           \
      corner[row * elements_per_row + column] = source.thread_elements()[0];                                           \
      corner[row * elements_per_row + column + 1] = source.thread_elements()[1];                                       \
    }                                                                                                                  \
  }
MSL_FOR_MEMORY(MSL_STORE)

// Row 2 t and 2 t + 1 of b in column g of a lane, from row g and columns 2 t and 2 t + 1.
template <class T> MSL_INLINE void msl_turn(vec<T, 2> b, thread float (&turned)[2]) {
  if constexpr (sizeof(T) == 2) {
    auto pair = __builtin_bit_cast(vec<T, 2>, msl_transposed(__builtin_bit_cast(uint, b)));
    turned[0] = (float)pair[0];
    turned[1] = (float)pair[1];
  } else {
    uint x = __builtin_bit_cast(uint, (float)b[0]), y = __builtin_bit_cast(uint, (float)b[1]);
    uint low = msl_transposed((x & 0xffffu) | y << 16), high = msl_transposed(x >> 16 | (y & 0xffff0000u));
    turned[0] = __builtin_bit_cast(float, (low & 0xffffu) | high << 16);
    turned[1] = __builtin_bit_cast(float, low >> 16 | (high & 0xffff0000u));
  }
}

template <class A, class B> MSL_INLINE void msl_multiply(thread float (&c)[4], vec<A, 2> a, vec<B, 2> b) {
  if constexpr (is_same_v<A, half> && is_same_v<B, half>) {
    msl_mma_half(c, __builtin_bit_cast(uint, a), 0u, msl_transposed(__builtin_bit_cast(uint, b)));
  } else if constexpr (is_same_v<A, bfloat> && is_same_v<B, bfloat>) {
    msl_mma_bfloat(c, __builtin_bit_cast(uint, a), 0u, msl_transposed(__builtin_bit_cast(uint, b)));
  } else {
    // Lane t of four has columns t and t + 4 of a, and those rows of b: they stand for 2 t and 2 t + 1, in both alike.
    float turned[2];
    msl_turn<B>(b, turned);
    constexpr bool split_a = MSL_FLOAT_PRODUCTS == 2 && is_same_v<A, float>;
    constexpr bool split_b = MSL_FLOAT_PRODUCTS == 2 && is_same_v<B, float>;
    uint upper[2], lower[2] = {0, 0}, right[2], rest[2];
    for (int i = 0; i < 2; ++i) {
      if constexpr (split_a) msl_split((float)a[i], upper[i], lower[i]);
      else upper[i] = msl_tf32((float)a[i]);
      if constexpr (split_b) msl_split(turned[i], right[i], rest[i]);
      else right[i] = msl_tf32(turned[i]);
    }
    // The small products first: the sum is then rounded at the size of the large ones once less.
    if constexpr (split_b) msl_mma_tf32(c, upper, lower, rest);
    msl_mma_tf32(c, upper, lower, right);
    if constexpr (split_a) {
      c[0] += c[2];
      c[1] += c[3];
    }
  }
}

// d = a b + c, in float within one 8x8x8 step, rounded once to d's type.
template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &d,
                                              thread const simdgroup_matrix<A, 8, 8> &a,
                                              thread const simdgroup_matrix<B, 8, 8> &b,
                                              thread const simdgroup_matrix<C, 8, 8> &c) {
  float sums[4] = {(float)c.thread_elements()[0], (float)c.thread_elements()[1], 0.0f, 0.0f};
  msl_multiply<A, B>(sums, a.thread_elements(), b.thread_elements());
  d.thread_elements() = vec<D, 2>{(D)sums[0], (D)sums[1]};
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8> &d, thread const simdgroup_matrix<A, 8, 8> &a,
                                   thread const simdgroup_matrix<B, 8, 8> &b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}
} // namespace metal
