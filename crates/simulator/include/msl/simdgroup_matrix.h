// simdgroup_matrix (specification, chapters 2.4 and 6.7). A lane's object names a tile of its simdgroup, which the
// runtime keeps; the elements come to the lane only when thread_elements() asks for them. Until then loads and
// products need no waiting for the other lanes (see runtime/matrix.cc).
//
// The lane map is the one that MLX (steel/attn/mma.h), PyTorch (PrefillAttention.h) and metal-flash-attention rely
// on; Apple does not document it.
#pragma once

namespace metal {
MSL_INLINE constexpr uint msl_tile_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
MSL_INLINE constexpr uint msl_tile_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

template <class T> constexpr constant uint msl_element_kind = 0;
template <> constexpr constant uint msl_element_kind<float> = MSL_FLOAT;
template <> constexpr constant uint msl_element_kind<half> = MSL_HALF;
template <> constexpr constant uint msl_element_kind<bfloat> = MSL_BFLOAT;

// Out of line: a kernel unrolls hundreds of these. The checker need not see what they do with the lane's own object.
#define MSL_OUT_OF_LINE __attribute__((noinline, no_sanitize("thread")))

template <class T, int Columns, int Rows> class simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup_matrix: 8x8 is the only size");
  static_assert(msl_element_kind<T> != 0, "simdgroup_matrix: the elements are float, half or bfloat");

public:
  using storage_type = vec<T, 2>;

  MSL_OUT_OF_LINE simdgroup_matrix() : m_tile(0), m_state(empty) {}
  MSL_OUT_OF_LINE explicit simdgroup_matrix(T diagonal) : m_tile(0), m_state(empty) {
    int offset = (int)msl_tile_row(msl_lane()) - (int)msl_tile_column(msl_lane());
    msl_set_local(offset == 0 ? diagonal : T(0), offset == 1 ? diagonal : T(0));
  }
  MSL_OUT_OF_LINE simdgroup_matrix(thread const simdgroup_matrix &other) { msl_copy(other); }
  MSL_OUT_OF_LINE thread simdgroup_matrix &operator=(thread const simdgroup_matrix &other) {
    if (this != &other) {
      msl_drop();
      msl_copy(other);
    }
    return *this;
  }
#if MSL_CHECK_LAYER
  MSL_OUT_OF_LINE
#else
  MSL_INLINE
#endif
  ~simdgroup_matrix() { msl_drop(); }

  // Stricter than Metal: the next operation that writes the matrix ends the life of the reference.
  MSL_INLINE thread storage_type &thread_elements(MSL_LINE) {
    msl_fetch(msl_line);
    return m_elements;
  }
  MSL_INLINE thread const storage_type &thread_elements(MSL_LINE) const {
    msl_fetch(msl_line);
    return m_elements;
  }

  // for the functions below

  // The tile that holds the value; elements that live in the lanes become one.
  MSL_INLINE uint msl_operand(int line) const { return m_state == in_tile ? m_tile : msl_imported(line); }
  MSL_OUT_OF_LINE uint msl_imported(int line) const {
    if (m_state == stale) {
      msl_expect_no_stale_write(line);
      return m_tile;
    }
    if (m_state == empty) msl_fail(line, "a simdgroup_matrix is used before anything was put into it");
    uint born = m_tile ? msl_now() : m_born; // until now the tile that the elements came from stood for them
    uint tile = msl_matrix_import(msl_element_kind<T>, (float)m_elements[0], (float)m_elements[1], born, line);
    msl_replace_tile(tile);
    if (m_state == local) m_state = in_tile;
    return tile;
  }
  MSL_INLINE void msl_set_tile(uint tile) {
    msl_replace_tile(tile);
    if (m_state == shared) {
      m_elements = storage_type(__builtin_nanf("")); // whoever still holds a reference shall notice
      m_state = stale;
    } else if (m_state != stale) {
      m_state = in_tile;
    }
  }
  MSL_OUT_OF_LINE void msl_set_loaded(float first, float second, const void *source, ulong stride, bool transpose,
                                      int line) {
    msl_set_tile(msl_matrix_load(msl_element_kind<T>, first, second, source, stride, transpose, line));
  }
  MSL_OUT_OF_LINE void msl_set_local(T first, T second) {
    msl_drop();
    m_tile = 0;
    m_elements = storage_type{first, second};
    m_born = msl_now();
    m_state = local;
  }

  MSL_OUT_OF_LINE storage_type msl_stored(const void *destination, ulong stride, bool transpose, int line) const {
    uint tile = msl_operand(line);
    float pair[2];
    msl_matrix_read(tile, pair, line);
    msl_matrix_store(tile, destination, stride, transpose, line);
    return storage_type{(T)pair[0], (T)pair[1]};
  }

private:
  // stale: in a tile again, while somebody may hold a reference to the elements
  enum state : uint { empty, in_tile, local, shared, stale };
  mutable storage_type m_elements;
  mutable uint m_tile; // also kept while the elements are local: the fragment stays live
  mutable uint m_born;
  mutable state m_state;

  static MSL_INLINE uint msl_now() {
#if MSL_CHECK_LAYER
    return msl_matrix_now();
#else
    return 0;
#endif
  }
  MSL_INLINE void msl_drop() const {
    if (m_tile && msl_lane() == 0) msl_matrix_release(m_tile);
  }
  MSL_INLINE void msl_copy(thread const simdgroup_matrix &other) {
    if (other.m_state == shared || other.m_state == local) {
      m_tile = 0;
      m_elements = other.m_elements;
      m_born = msl_now();
      m_state = local;
      return;
    }
    m_tile = other.m_tile;
    if (m_tile && msl_lane() == 0) msl_matrix_retain(m_tile);
    m_state = other.m_state == empty ? empty : in_tile;
  }
  MSL_INLINE void msl_replace_tile(uint tile) const {
    if (m_tile) {
#if MSL_CHECK_LAYER
      if (m_state != in_tile && m_state != stale) msl_matrix_touch(m_tile);
#endif
      if (msl_lane() == 0) msl_matrix_release(m_tile);
    }
    m_tile = tile;
  }
  // Brings the elements to the lane.
  MSL_OUT_OF_LINE void msl_fetch(int line) const {
    if (m_state == stale) msl_expect_no_stale_write(line);
    if (m_state == in_tile || m_state == stale) {
      float pair[2];
      msl_matrix_read(m_tile, pair, line);
      m_elements = storage_type{(T)pair[0], (T)pair[1]};
    } else if (m_state == empty) {
      m_born = msl_now();
    }
#if MSL_CHECK_LAYER
    else if (m_tile) msl_matrix_touch(m_tile);
#endif
    m_state = shared;
  }
  MSL_INLINE void msl_expect_no_stale_write(int line) const {
    // by bits, because a finite-math build folds comparisons of NaN
    ulong bits = 0, poison = 0;
    storage_type nan = storage_type(__builtin_nanf(""));
    __builtin_memcpy(&bits, &m_elements, sizeof m_elements);
    __builtin_memcpy(&poison, &nan, sizeof nan);
    if (bits != poison)
      msl_fail(line, "an element was written through a reference of thread_elements() that is older than the last "
                     "operation on the matrix");
  }
};

typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = Columns>
MSL_INLINE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.msl_set_local(value, value);
  return result;
}
template <class T, int Columns, int Rows = Columns>
MSL_INLINE simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, Columns, Rows>(value);
}

#if MSL_CHECK_LAYER
// In the lane, so that the checker sees who reads what.
template <class T, class Pointer>
MSL_INLINE void msl_load(thread simdgroup_matrix<T, 8, 8> &result, Pointer corner, ulong elements_per_row,
                         bool transpose, int line) {
  ulong row = msl_tile_row(msl_lane()), column = msl_tile_column(msl_lane());
  ulong down = transpose ? 1 : elements_per_row, right = transpose ? elements_per_row : 1;
  float first = (float)corner[row * down + column * right];
  float second = (float)corner[row * down + (column + 1) * right];
  result.msl_set_loaded(first, second, (const void *)corner, elements_per_row, transpose, line);
}
#else
template <class T, class Pointer>
MSL_OUT_OF_LINE void msl_load(thread simdgroup_matrix<T, 8, 8> &result, Pointer corner, ulong elements_per_row,
                              bool transpose, int line) {
  result.msl_set_tile(
      msl_matrix_load_whole(msl_element_kind<T>, (const void *)corner, elements_per_row, transpose, line));
}
#endif

#define MSL_LOAD(space)                                                                                                \
  template <class T>                                                                                                   \
  MSL_INLINE void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &result, space const T *source,                      \
                                 ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0}, bool transpose = false,     \
                                 MSL_LINE) {                                                                           \
    msl_load(result, source + origin.y * elements_per_row + origin.x, elements_per_row, transpose, msl_line);          \
  }
MSL_FOR_READABLE(MSL_LOAD)

#define MSL_STORE(space)                                                                                               \
  template <class T>                                                                                                   \
  MSL_INLINE void simdgroup_store(thread const simdgroup_matrix<T, 8, 8> &source, space T *destination,                \
                                  ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0}, bool transpose = false,    \
                                  MSL_LINE) {                                                                          \
    ulong row = msl_tile_row(msl_lane()), column = msl_tile_column(msl_lane());                                        \
    space T *corner = destination + origin.y * elements_per_row + origin.x;                                            \
    vec<T, 2> pair = source.msl_stored((const void *)corner, elements_per_row, transpose, msl_line);                   \
    if (transpose) {                                                                                                   \
      corner[column * elements_per_row + row] = pair[0];                                                            \
      corner[(column + 1) * elements_per_row + row] = pair[1];                                                      \
    } else {                                                                                                           \
      corner[row * elements_per_row + column] = pair[0];                                                            \
      corner[row * elements_per_row + column + 1] = pair[1];                                                        \
    }                                                                                                                  \
  }
MSL_FOR_MEMORY(MSL_STORE)

// d = a b + c. The model: fp32 within one 8x8x8 step, fused, in order of the inner index, rounded once to d's type.
template <class D, class A, class B, class C>
MSL_OUT_OF_LINE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &d,
                                              thread const simdgroup_matrix<A, 8, 8> &a,
                                              thread const simdgroup_matrix<B, 8, 8> &b,
                                              thread const simdgroup_matrix<C, 8, 8> &c, MSL_LINE) {
  uint tile_a = a.msl_operand(msl_line), tile_b = b.msl_operand(msl_line), tile_c = c.msl_operand(msl_line);
  d.msl_set_tile(msl_matrix_multiply(msl_element_kind<D>, tile_a, tile_b, tile_c, msl_line));
}
template <class D, class A, class B>
MSL_OUT_OF_LINE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8> &d, thread const simdgroup_matrix<A, 8, 8> &a,
                                   thread const simdgroup_matrix<B, 8, 8> &b, MSL_LINE) {
  uint tile_a = a.msl_operand(msl_line), tile_b = b.msl_operand(msl_line);
  d.msl_set_tile(msl_matrix_multiply(msl_element_kind<D>, tile_a, tile_b, 0, msl_line));
}
} // namespace metal
