// Cooperative tensors (SDK header metal_cooperative_tensor): a matrix in the registers of a simdgroup, laid out so that
// the matrix instructions take it as it lies.
//
// A matrix is cut into tiles of 16 rows and 8 columns. Of each, hardware lane 4 g + t has rows g and g + 8, and two columns:
// 2 t and 2 t + 1, as an accumulator and a left operand have them (instructions.h). It is free which column of the matrix
// a column of a tile stands for. Neighbouring tiles form chunks, and deal out the chunk's columns so that what a lane reads
// of a row of an operand in memory lies side by side, 16 bytes of it in a whole chunk of 16-bit elements:
//   msl_paired  4 tiles: a lane has columns 8 t .. 8 t + 7. The contracted dimension, in both operands, and the columns
//               of a result whose right operand is transposed: it is the left operand of the next product as it lies.
//   msl_spread  8 tiles: a lane has columns 16 t .. 16 t + 15, and lane group g reads columns 8 g .. 8 g + 7. The columns
//               of a result whose right operand is not transposed.
// Fewer tiles at the end form chunks of 4, 2 and 1.
#pragma once

namespace metal {
MSL_INLINE int msl_group() { return (int)__nvvm_read_ptx_sreg_laneid() / 4; }
MSL_INLINE int msl_member() { return (int)__nvvm_read_ptx_sreg_laneid() % 4; }

// Tiles first .. first + width - 1.
struct msl_chunk {
  int first;
  int width;
};
MSL_INLINE constexpr msl_chunk msl_chunk_of(int tile, int tiles, int widest) {
  int rest = tiles / widest * widest;
  if (tile < rest) return {tile / widest * widest, widest};
  if (widest > 4 && (tiles & 4) != 0) {
    if (tile < rest + 4) return {rest, 4};
    rest += 4;
  }
  if ((tiles & 2) != 0 && tile < rest + 2) return {rest, 2};
  return {tile, 1};
}

// Both maps: where the columns begin that a lane has of a chunk, and which of its elements belong to which tile.
struct msl_paired {
  static constexpr int widest = 4;
  static MSL_INLINE constexpr int element(int tile, int e, int) { return 2 * tile + e; }
  // The column that column `lane_group` of a tile stands for, from the first of its chunk.
  static MSL_INLINE int column(int tile, int width, int lane_group) {
    return 2 * width * (lane_group / 2) + 2 * tile + lane_group % 2;
  }
};
struct msl_spread {
  static constexpr int widest = 8;
  static MSL_INLINE constexpr int element(int tile, int e, int width) { return width * e + tile; }
  static MSL_INLINE int column(int tile, int width, int lane_group) { return width * lane_group + tile; }
};

// Calls f(width, first) for each chunk of so many tiles, the width as a type.
template <int N> struct msl_number { static constexpr int value = N; };
template <int Tiles, int Widest, class F> MSL_INLINE void msl_for_chunks(F f) {
#pragma clang loop unroll(full)
  for (int first = 0; first + Widest <= Tiles; first += Widest) f(msl_number<Widest>{}, first);
  constexpr int rest = Tiles / Widest * Widest;
  if constexpr (Widest > 4 && (Tiles & 4) != 0) f(msl_number<4>{}, rest);
  if constexpr ((Tiles & 2) != 0) f(msl_number<2>{}, Tiles & ~3);
  if constexpr ((Tiles & 1) != 0) f(msl_number<1>{}, Tiles & ~1);
}

// A matrix of Rows x Columns over the simdgroups of a scope: element 4 (block tiles + tile) + 2 h + e of a lane is the
// one of row g + 8 h of a block of 16 rows, and e of its two columns of a tile.
template <int Rows, int Columns, class Map, int Simdgroups> struct msl_matrix_layout {
  using map = Map;
  static_assert(Columns % 8 == 0, "cooperative tensor: the columns are a multiple of 8");
  static constexpr int rows = Rows, columns = Columns;
  static constexpr int all_blocks = (Rows + 15) / 16, all_tiles = Columns / 8;
  static constexpr int simdgroups_down = all_blocks % Simdgroups == 0 ? Simdgroups : all_blocks < Simdgroups && Simdgroups % all_blocks == 0 ? all_blocks : 1;
  static constexpr int simdgroups_across = Simdgroups / simdgroups_down;
  static constexpr int blocks = all_blocks / simdgroups_down;
  static constexpr int tiles = (all_tiles + simdgroups_across - 1) / simdgroups_across;
  static constexpr bool exact = Rows % 16 == 0 && all_tiles % simdgroups_across == 0;
  static constexpr int capacity = 4 * blocks * tiles, rank = 2;

  // The first row and column that the simdgroup has.
  static MSL_INLINE int first_row() {
    return simdgroups_down == 1 ? 0 : (int)msl_simdgroup() % simdgroups_down * (16 * blocks);
  }
  static MSL_INLINE int first_column() {
    return simdgroups_across == 1 ? 0 : (int)msl_simdgroup() / simdgroups_down * (8 * tiles);
  }
  static MSL_INLINE int row(int block, int h) { return first_row() + 16 * block + 8 * h + msl_group(); }
  static MSL_INLINE int column(int tile, int lane_group) {
    const msl_chunk chunk = msl_chunk_of(tile, tiles, Map::widest);
    return first_column() + 8 * chunk.first + Map::column(tile - chunk.first, chunk.width, lane_group);
  }
  // index() of element i: the column, then the row.
  static MSL_INLINE array<int, 2> index(int i) {
    return {{column(i / 4 % tiles, 2 * msl_member() + i % 2), row(i / 4 / tiles, i / 2 % 2)}};
  }
  static MSL_INLINE bool valid(int i) {
    if constexpr (exact) return true;
    const array<int, 2> at = index(i);
    return at[0] < Columns && at[1] < Rows;
  }
};

// A right operand: element 2 (tile_n * tiles_k + tile_k) + e of a lane is the one of column g of a tile of columns, and e
// of its two rows of a tile of the contraction.
template <int Contracted, int Columns, class Map, bool Transposed> struct msl_right_layout {
  static_assert(Contracted % 8 == 0 && Columns % 8 == 0, "cooperative tensor: both sizes are multiples of 8");
  static constexpr int tiles_k = Contracted / 8, tiles = Columns / 8;
  static constexpr int capacity = 2 * tiles_k * tiles, rank = 2;
  static MSL_INLINE array<int, 2> index(int i) {
    const msl_chunk chunk = msl_chunk_of(i / 2 / tiles_k, tiles, Map::widest);
    const int n = 8 * chunk.first + Map::column(i / 2 / tiles_k - chunk.first, chunk.width, msl_group());
    const msl_chunk contracted = msl_chunk_of(i / 2 % tiles_k, tiles_k, msl_paired::widest);
    const int tile = i / 2 % tiles_k - contracted.first;
    const int k = 8 * contracted.first + msl_paired::column(tile, contracted.width, 2 * msl_member() + i % 2);
    return {{Transposed ? k : n, Transposed ? n : k}};
  }
  static MSL_INLINE bool valid(int) { return true; }
};

// One value for each row of a matrix that a lane has, and one for each column.
template <class Matrix> struct msl_rows_layout {
  static constexpr int capacity = 2 * Matrix::blocks, rank = 1;
  static MSL_INLINE array<int, 1> index(int i) { return {{Matrix::row(i / 2, i % 2)}}; }
  static MSL_INLINE bool valid(int i) { return Matrix::exact || index(i)[0] < Matrix::rows; }
  static MSL_INLINE constexpr int of(int i) { return i / 4 / Matrix::tiles * 2 + i / 2 % 2; }
};
template <class Matrix> struct msl_columns_layout {
  static constexpr int capacity = 2 * Matrix::tiles, rank = 1;
  static MSL_INLINE array<int, 1> index(int i) { return {{Matrix::column(i / 2, 2 * msl_member() + i % 2)}}; }
  static MSL_INLINE bool valid(int i) { return Matrix::exact || index(i)[0] < Matrix::columns; }
  static MSL_INLINE constexpr int of(int i) { return i / 4 % Matrix::tiles * 2 + i % 2; }
};

template <class Element, class Extents, class Layout> struct cooperative_tensor {
  using element_type = Element;
  using value_type = Element;
  using extents_type = Extents;
  using layout = Layout;

  // An element by its position; *it is the element.
  struct iterator {
    thread cooperative_tensor *m_tensor;
    int m_position;
    MSL_INLINE thread Element &operator*() const { return m_tensor->m_elements[m_position]; }
    MSL_INLINE thread iterator &operator++() { return ++m_position, *this; }
    MSL_INLINE iterator operator++(int) { return {m_tensor, m_position++}; }
    MSL_INLINE thread iterator &operator+=(int n) { return m_position += n, *this; }
    MSL_INLINE iterator operator+(int n) const { return {m_tensor, m_position + n}; }
    MSL_INLINE iterator operator-(int n) const { return {m_tensor, m_position - n}; }
    MSL_INLINE int operator-(iterator other) const { return m_position - other.m_position; }
    MSL_INLINE bool operator==(iterator other) const { return m_position == other.m_position; }
    MSL_INLINE bool operator!=(iterator other) const { return m_position != other.m_position; }
  };
  using const_iterator = iterator;

  static MSL_INLINE constexpr size_t get_rank() { return Layout::rank; }
  static MSL_INLINE constexpr uint16_t get_capacity() { return Layout::capacity; }
  MSL_INLINE bool is_valid_element(uint16_t i) const { return Layout::valid(i); }
  MSL_INLINE bool is_valid_element(iterator it) const { return Layout::valid(it.m_position); }
  MSL_INLINE auto get_multidimensional_index(uint16_t i) const { return Layout::index(i); }
  MSL_INLINE auto get_multidimensional_index(iterator it) const { return Layout::index(it.m_position); }
  MSL_INLINE thread Element &operator[](uint16_t i) { return m_elements[i]; }
  MSL_INLINE Element operator[](uint16_t i) const { return m_elements[i]; }
  MSL_INLINE Element get(uint16_t i) const { return Layout::valid(i) ? m_elements[i] : Element(0); }
  MSL_INLINE void set(uint16_t i, Element value) {
    if (Layout::valid(i)) m_elements[i] = value;
  }
  MSL_INLINE iterator begin() { return {this, 0}; }
  MSL_INLINE iterator end() { return {this, Layout::capacity}; }
  MSL_INLINE iterator get_iterator(uint16_t i) { return {this, i}; }
  // Of a reduction: the element that the row, or the column, of another tensor's element became.
  template <class Iterator> MSL_INLINE iterator map_iterator(Iterator source) {
    return {this, Layout::of(source.m_position)};
  }

  // Elements within the extents, one after the other.
  template <class Tensor> MSL_INLINE void load(thread const Tensor &source) {
    static_assert(is_same_v<typename Tensor::value_type, Element>, "load: the element types differ");
    each([&](thread Element &element, auto at) {
      element = inside(source, at) ? *address(source, at) : Element(0);
    });
  }
  template <class Tensor> MSL_INLINE void store(thread const Tensor &target) {
    static_assert(is_same_v<typename Tensor::value_type, Element>, "store: the element types differ");
    each([&](thread Element &element, auto at) {
      if (inside(target, at)) *address(target, at) = element;
    });
  }

  Element m_elements[Layout::capacity];

private:
  template <class F> MSL_INLINE void each(F f) {
#pragma clang loop unroll(full)
    for (int i = 0; i < Layout::capacity; ++i)
      if (Layout::valid(i)) f(m_elements[i], Layout::index(i));
  }
  template <class Tensor, size_t Rank> static MSL_INLINE bool inside(thread const Tensor &tensor, array<int, Rank> at) {
    bool result = true;
    for (size_t r = 0; r < Rank; ++r) result &= at[r] < tensor.get_extent(r);
    return result;
  }
  template <class Tensor, size_t Rank> static MSL_INLINE auto address(thread const Tensor &tensor, array<int, Rank> at) {
    auto result = tensor.msl_data();
    for (size_t r = 0; r < Rank; ++r) result += (long)at[r] * tensor.get_stride(r);
    return result;
  }
};
} // namespace metal
