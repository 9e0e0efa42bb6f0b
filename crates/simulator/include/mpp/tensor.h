// tensor (specification, chapter 2.21): a view of memory with sizes and strides. Only tensors that a shader builds from
// a pointer (tensor_inline) are here; a bound tensor resource needs an API that torch does not offer.
//
// What a target can say about a broken rule differs: it may define MSL_TENSOR_REQUIRE(condition, line, text) first.
#pragma once

#ifndef MSL_TENSOR_REQUIRE
#define MSL_TENSOR_REQUIRE(condition, line, text)
#endif

namespace metal {
struct tensor_handle {};
struct tensor_inline {};

template <class ElementType, class Extents, class Descriptor = tensor_handle, class... Tags> class tensor {
  static constexpr size_t rank = Extents::rank();
  static_assert(rank == 1 || rank == 2, "tensor: ranks 1 and 2 are simulated");

public:
  using element_type = ElementType; // with its address space
  using value_type = remove_addrspace_t<ElementType>;
  using extents_type = Extents;
  using index_type = typename Extents::index_type;
  using data_handle_type = ElementType *;

  // Packed.
  MSL_INLINE tensor(ElementType *data, Extents sizes, MSL_LINE) : m_data(data), m_extents(sizes) {
    index_type stride = 1;
    for (size_t r = 0; r < rank; ++r) {
      m_strides[r] = stride;
      stride *= sizes.extent(r);
    }
    msl_require_sizes(msl_line);
  }
  template <class Stride>
  MSL_INLINE tensor(ElementType *data, Extents sizes, array<Stride, rank> strides, MSL_LINE)
      : m_data(data), m_extents(sizes) {
    for (size_t r = 0; r < rank; ++r) m_strides[r] = (index_type)strides[r];
    msl_require_sizes(msl_line);
  }

  static constexpr size_t get_rank() { return rank; }
  static constexpr size_t get_static_extent(size_t r) { return Extents::static_extent(r); }
  MSL_INLINE index_type get_extent(size_t r) const { return m_extents.extent(r); }
  MSL_INLINE index_type get_stride(size_t r) const { return m_strides[r]; }
  MSL_INLINE ElementType &operator[](array<index_type, rank> at) const {
    long offset = 0;
    for (size_t r = 0; r < rank; ++r) offset += (long)at[r] * m_strides[r];
    return m_data[offset];
  }

  // What lies behind an origin: smaller sizes, the same strides. Beyond the tensor nothing is defined.
  template <class First, class Second> MSL_INLINE auto slice(First first, Second second, MSL_LINE) const {
    msl_require_origin(first, second, msl_line);
    using Sizes = dextents<index_type, 2>;
    Sizes sizes((index_type)(get_extent(0) - (index_type)first), (index_type)(get_extent(1) - (index_type)second));
    return tensor<ElementType, Sizes, tensor_inline>(msl_at(first, second, msl_line), sizes, msl_strides(), msl_line);
  }
  // A tile of static size, whose edges matmul2d does not check: here it must lie inside of the tensor.
  template <size_t E0, size_t E1, class First, class Second>
  MSL_INLINE auto slice(First first, Second second, MSL_LINE) const {
    msl_require_origin(first, second, msl_line);
    MSL_TENSOR_REQUIRE((E0 == dynamic_extent || (long)first + (long)E0 <= (long)get_extent(0)) &&
                           (E1 == dynamic_extent || (long)second + (long)E1 <= (long)get_extent(1)),
                       msl_line, "a slice of static size reaches beyond its tensor: nothing checks its edges");
    using Sizes = extents<index_type, E0, E1>;
    Sizes sizes((index_type)(E0 == dynamic_extent ? get_extent(0) - (index_type)first : (index_type)E0),
                (index_type)(E1 == dynamic_extent ? get_extent(1) - (index_type)second : (index_type)E1));
    return tensor<ElementType, Sizes, tensor_inline>(msl_at(first, second, msl_line), sizes, msl_strides(), msl_line);
  }

  MSL_INLINE ElementType *msl_data() const { return m_data; }

private:
  ElementType *m_data;
  Extents m_extents;
  index_type m_strides[rank];

  MSL_INLINE array<index_type, rank> msl_strides() const {
    array<index_type, rank> strides;
    for (size_t r = 0; r < rank; ++r) strides[r] = m_strides[r];
    return strides;
  }
  template <class First, class Second> MSL_INLINE ElementType *msl_at(First first, Second second, int line) const {
    long offset = (long)first * m_strides[0] + (long)second * m_strides[1];
    MSL_TENSOR_REQUIRE(offset == (long)(index_type)offset, line,
                       "the offset of a slice does not fit the tensor's index type: move the pointer instead");
    return m_data + offset;
  }
  MSL_INLINE void msl_require_sizes(int line) const {
    static_assert(is_same_v<Descriptor, tensor_inline>, "tensor: only tensor_inline is simulated");
    for (size_t r = 0; r < rank; ++r)
      MSL_TENSOR_REQUIRE(get_extent(r) >= 0 && m_strides[r] >= 0, line, "a tensor has a negative extent or stride");
    // Metal: MTLTensorDescriptor.strides, "the first stride must be one".
    MSL_TENSOR_REQUIRE(m_strides[0] == 1, line, "the first stride of a tensor must be 1");
  }
  template <class First, class Second> MSL_INLINE void msl_require_origin(First first, Second second, int line) const {
    MSL_TENSOR_REQUIRE((long)first >= 0 && (long)second >= 0 && (long)first <= (long)get_extent(0) &&
                           (long)second <= (long)get_extent(1),
                       line, "a slice begins outside of its tensor");
  }
};

template <class T, class Index, size_t... E>
tensor(T *, extents<Index, E...>) -> tensor<T, extents<Index, E...>, tensor_inline>;
template <class T, class Index, size_t... E, class Stride, size_t N>
tensor(T *, extents<Index, E...>, array<Stride, N>) -> tensor<T, extents<Index, E...>, tensor_inline>;

template <class T> struct msl_is_tensor : false_type {};
template <class... T> struct msl_is_tensor<tensor<T...>> : true_type {};
} // namespace metal
