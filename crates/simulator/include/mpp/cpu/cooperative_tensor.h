// cooperative_tensor (specification, chapter 2.22; metal_cooperative_tensor): a small matrix whose elements the lanes
// of a scope share out. Which lane has which element is the launch's choice (runtime/layout.cc), so that a kernel that
// assumes a layout fails under another one.
//
// Stricter than Metal: a cooperative tensor is not copied, and the driver refuses it inside of a struct or an array.
#pragma once

#ifndef MSL_OUT_OF_LINE
#define MSL_OUT_OF_LINE __attribute__((noinline, no_sanitize("thread")))
#endif

namespace metal {
// LeftInMemory, RightInMemory: what the destination was made for, as its layout may depend on it.
template <msl_tensor_role Role, uint Outer, uint Inner, uint Simdgroups, bool LeftInMemory = true,
          bool RightInMemory = true>
struct msl_cooperative_layout {
  static constexpr msl_tensor_shape shape{Role, Outer, Inner, Simdgroups};
  static constexpr bool left_in_memory = LeftInMemory, right_in_memory = RightInMemory;
  static constexpr size_t rank = Role <= MSL_DESTINATION ? 2 : 1;
  static constexpr uint rows = (Outer + 15) / 16, columns = (Inner + 15) / 16; // of 16x16 fragments, 8 elements a lane
  static constexpr uint shared = (rows * columns + Simdgroups - 1) / Simdgroups * 8;
  // What a lane holds in registers, and the most that any layout asks for.
  static constexpr uint held = Role == MSL_ROW_REDUCTION      ? rows * 2
                               : Role == MSL_COLUMN_REDUCTION ? columns * 4
                                                              : shared;
  static constexpr uint most = shared + 4;
};
template <class Layout, class Coordinate> struct msl_cooperative_extents {
  using type = extents<Coordinate, Layout::shape.inner, Layout::shape.outer>;
};
template <class Layout, class Coordinate>
  requires(Layout::rank == 1)
struct msl_cooperative_extents<Layout, Coordinate> {
  using type = extents<Coordinate, Layout::shape.role == MSL_ROW_REDUCTION ? Layout::shape.outer : Layout::shape.inner>;
};

template <class Tensor> class msl_cooperative_iterator {
public:
  MSL_INLINE msl_cooperative_iterator(thread Tensor *tensor, int slot) : m_tensor(tensor), m_slot(slot) {}
  MSL_INLINE auto &operator*() const { return (*m_tensor)[m_slot]; }
  MSL_INLINE auto &operator[](int distance) const { return (*m_tensor)[m_slot + distance]; }
  MSL_INLINE msl_cooperative_iterator &operator++() { return ++m_slot, *this; }
  MSL_INLINE msl_cooperative_iterator &operator--() { return --m_slot, *this; }
  MSL_INLINE msl_cooperative_iterator operator++(int) { return {m_tensor, m_slot++}; }
  MSL_INLINE msl_cooperative_iterator operator--(int) { return {m_tensor, m_slot--}; }
  MSL_INLINE msl_cooperative_iterator &operator+=(int distance) { return m_slot += distance, *this; }
  MSL_INLINE msl_cooperative_iterator &operator-=(int distance) { return m_slot -= distance, *this; }
  MSL_INLINE msl_cooperative_iterator operator+(int distance) const { return {m_tensor, m_slot + distance}; }
  MSL_INLINE msl_cooperative_iterator operator-(int distance) const { return {m_tensor, m_slot - distance}; }
  MSL_INLINE int operator-(msl_cooperative_iterator other) const { return m_slot - other.m_slot; }
  MSL_INLINE bool operator==(msl_cooperative_iterator other) const { return m_slot == other.m_slot; }
  MSL_INLINE bool operator!=(msl_cooperative_iterator other) const { return m_slot != other.m_slot; }
  MSL_INLINE bool operator<(msl_cooperative_iterator other) const { return m_slot < other.m_slot; }

  MSL_INLINE thread Tensor &msl_tensor() const { return *m_tensor; }
  MSL_INLINE int msl_slot() const { return m_slot; }

private:
  thread Tensor *m_tensor;
  int m_slot;
};

template <class ElementType, class Extents, class Layout> class cooperative_tensor {
public:
  using element_type = ElementType;
  using value_type = ElementType;
  using extents_type = Extents;
  using layout = Layout;
  using index_type = typename Extents::index_type;
  using iterator = msl_cooperative_iterator<cooperative_tensor>;
  using const_iterator = msl_cooperative_iterator<const cooperative_tensor>;

  MSL_OUT_OF_LINE cooperative_tensor() : m_life{Layout::held * (uint)sizeof(ElementType) / 2} {
    m_layout = msl_tensor_layout(&Layout::shape);
    m_capacity = m_layout->capacity;
    msl_tensor_poison(m_elements, sizeof m_elements);
  }
  // The values of another operation's destination.
  MSL_OUT_OF_LINE cooperative_tensor(msl_tensor_operand source, int line) : cooperative_tensor() {
    msl_tensor_operand destination = msl_operand();
    msl_tensor_convert(&source, &destination, line);
  }
  cooperative_tensor(thread const cooperative_tensor &) = delete;
  thread cooperative_tensor &operator=(thread const cooperative_tensor &) = delete;
#if MSL_CHECK_LAYER
  MSL_OUT_OF_LINE ~cooperative_tensor() {
    if (msl_lane() == 0) msl_life_end(&m_life);
  }
#endif

  static constexpr size_t get_rank() { return Layout::rank; }
  // Elements of this lane. Not a constant: it is the implementation's choice.
  MSL_INLINE uint16_t get_capacity() const { return (uint16_t)m_capacity; }

  MSL_INLINE bool is_valid_element(int i) const { return msl_at(i) >= 0; }
  MSL_INLINE bool is_valid_element(iterator i) const { return is_valid_element(i.msl_slot()); }
  MSL_INLINE bool is_valid_element(const_iterator i) const { return is_valid_element(i.msl_slot()); }

  // [0] runs along the inner dimension.
  MSL_INLINE array<index_type, Layout::rank> get_multidimensional_index(int i) const {
    array<index_type, Layout::rank> index;
    int at = msl_at(i);
    if constexpr (Layout::rank == 1) {
      index[0] = (index_type)at;
    } else {
      index[0] = (index_type)(at < 0 ? -1 : at & 0xffff);
      index[1] = (index_type)(at < 0 ? -1 : at >> 16);
    }
    return index;
  }
  MSL_INLINE auto get_multidimensional_index(iterator i) const { return get_multidimensional_index(i.msl_slot()); }
  MSL_INLINE auto get_multidimensional_index(const_iterator i) const {
    return get_multidimensional_index(i.msl_slot());
  }

  MSL_INLINE thread ElementType &operator[](int i) {
    msl_touch();
    return m_elements[msl_checked(i)];
  }
  MSL_INLINE thread const ElementType &operator[](int i) const {
    msl_touch();
    return m_elements[msl_checked(i)];
  }
  MSL_INLINE ElementType get(int i) const { return is_valid_element(i) ? (*this)[i] : ElementType(0); }
  MSL_INLINE void set(int i, ElementType value) { (*this)[i] = value; }

  MSL_INLINE iterator begin() { return {this, 0}; }
  MSL_INLINE iterator end() { return {this, (int)m_capacity}; }
  MSL_INLINE iterator get_iterator(int i) { return {this, i}; }
  MSL_INLINE const_iterator begin() const { return {this, 0}; }
  MSL_INLINE const_iterator end() const { return {this, (int)m_capacity}; }

  // Where this reduction has the row (or column) of an element of a destination: end() if that is nobody's.
  template <class Source> MSL_INLINE iterator map_iterator(msl_cooperative_iterator<Source> from) {
    static_assert(Layout::rank == 1 && Source::layout::rank == 2,
                  "map_iterator: from a destination to a reduction");
    static_assert(Source::layout::shape.simdgroups == 1, "map_iterator needs a single simdgroup");
    return {this, (int)msl_mapped(from.msl_tensor().msl_layout_in_use(), from.msl_slot())};
  }

  // From and to memory; elements beyond the tensor's extents are neither.
  template <class Tensor> MSL_INLINE void load(thread const Tensor &tensor, MSL_LINE) {
    msl_require_memory<Tensor>();
    msl_tensor_operand memory = msl_memory_operand(tensor);
    msl_tensor_transfer("cooperative_tensor.load", &memory, Layout::shape.simdgroups, msl_line);
    msl_define();
    for (uint i = 0; i < m_capacity; ++i) {
      int at = msl_at((int)i);
      if (at < 0) continue;
      auto index = get_multidimensional_index((int)i);
      if (msl_inside(tensor, index)) m_elements[i] = tensor[index];
      else m_elements[i] = (ElementType)msl_tensor_outside();
    }
  }
  template <class Tensor> MSL_INLINE void store(thread const Tensor &tensor, MSL_LINE) const {
    msl_require_memory<Tensor>();
    static_assert(!is_const<typename Tensor::element_type>::value, "cooperative_tensor.store: the tensor is const");
    msl_tensor_operand memory = msl_memory_operand(tensor);
    msl_tensor_transfer("cooperative_tensor.store", &memory, Layout::shape.simdgroups, msl_line);
    for (uint i = 0; i < m_capacity; ++i) {
      int at = msl_at((int)i);
      if (at < 0) continue;
      auto index = get_multidimensional_index((int)i);
      if (msl_inside(tensor, index)) tensor[index] = (*this)[(int)i];
    }
  }

  // for operations

  MSL_OUT_OF_LINE msl_tensor_operand msl_operand() const {
    return {msl_element_kind<ElementType>, m_layout, (void *)m_elements, &m_life, {}, {}};
  }
  MSL_INLINE const msl_layout *msl_layout_in_use() const { return m_layout; }

private:
  ElementType m_elements[Layout::most];
  const msl_layout *m_layout;
  uint m_capacity;
  mutable msl_life m_life;

  MSL_INLINE uint msl_checked(int i) const {
    if ((uint)i >= m_capacity) msl_tensor_index_fails((uint)i, m_capacity);
    return (uint)i;
  }
  MSL_OUT_OF_LINE int msl_at(int i) const { return msl_tensor_coordinates(m_layout, (uint)i); }
  MSL_OUT_OF_LINE uint msl_mapped(const msl_layout *from, int slot) const {
    return msl_tensor_map(from, (uint)slot, m_layout);
  }
  MSL_INLINE void msl_touch() const {
#if MSL_CHECK_LAYER
    if (msl_lane() == 0) msl_life_touch(&m_life);
#endif
  }
  MSL_INLINE void msl_define() const {
#if MSL_CHECK_LAYER
    if (msl_lane() == 0) msl_life_define(&m_life);
#endif
  }
  template <class Tensor> static constexpr void msl_require_memory() {
    static_assert(msl_is_tensor<Tensor>::value, "cooperative_tensor.load and store take a tensor");
    static_assert(is_same_v<typename Tensor::value_type, ElementType>,
                  "cooperative_tensor.load and store: the element types must be equal");
    static_assert(Tensor::get_rank() == Layout::rank, "cooperative_tensor.load and store: the ranks must be equal");
  }
  template <class Tensor>
  static MSL_INLINE bool msl_inside(thread const Tensor &tensor, array<index_type, Layout::rank> at) {
    for (size_t r = 0; r < Layout::rank; ++r)
      if (at[r] >= (index_type)tensor.get_extent(r)) return false;
    return true;
  }
};

// How the runtime sees a tensor in memory.
template <class Tensor> MSL_OUT_OF_LINE msl_tensor_operand msl_memory_operand(thread const Tensor &tensor) {
  uint kind = msl_element_kind<typename Tensor::value_type>;
  msl_tensor_operand operand{kind, nullptr, (void *)tensor.msl_data(), nullptr, {1, 1}, {1, 0}};
  for (size_t r = 0; r < Tensor::get_rank(); ++r) {
    operand.extent[r] = tensor.get_extent(r);
    operand.stride[r] = tensor.get_stride(r);
  }
  return operand;
}

template <class T> struct msl_is_cooperative : false_type {};
template <class... T> struct msl_is_cooperative<cooperative_tensor<T...>> : true_type {};
} // namespace metal
