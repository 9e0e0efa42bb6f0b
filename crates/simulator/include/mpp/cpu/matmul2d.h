// matmul2d (MPPTensorOpsMatMul2d.h): the lanes of a scope hand their operands to the runtime, and the last one to come
// multiplies (runtime/matmul2d.cc).
#pragma once

namespace metal {
template <class Operand> MSL_INLINE msl_tensor_operand msl_operand_of(thread const Operand &operand) {
  if constexpr (msl_is_cooperative<Operand>::value) return operand.msl_operand();
  else return msl_memory_operand(operand);
}
MSL_OUT_OF_LINE inline void msl_multiply(msl_matmul2d_call call, int line) { msl_matmul2d(&call, line); }
} // namespace metal

namespace mpp {
namespace tensor_ops {
using metal::cooperative_tensor;

template <class T> constexpr void msl_require_operand_type() {
  static_assert(metal::is_same_v<T, metal::remove_reference_t<metal::remove_addrspace_t<T>>>,
                "matmul2d: strip reference, const and address space from an operand's type");
  static_assert(metal::msl_is_tensor<T>::value || metal::msl_is_cooperative<T>::value,
                "matmul2d: an operand's type is a tensor or a cooperative_tensor");
}
template <class T> constexpr bool msl_is_in_memory() { return metal::msl_is_tensor<T>::value; }

template <matmul2d_descriptor Descriptor, class Scope, class... Arguments> class matmul2d {
  static constexpr uint m = Descriptor.m, n = Descriptor.n;
  static constexpr uint simdgroups = Scope::msl_simdgroups > 0 ? Scope::msl_simdgroups : 1;
  static constexpr bool static_k = Descriptor.msl_has_static_k();
  static constexpr uint k = static_k ? Descriptor.k : 0;

  template <msl_tensor_role Role, uint Outer, uint Inner, bool LeftInMemory = true, bool RightInMemory = true>
  using msl_layout_of = metal::msl_cooperative_layout<Role, Outer, Inner, simdgroups, LeftInMemory, RightInMemory>;
  template <class Element, class Coordinate, class Layout>
  using msl_tensor_of =
      cooperative_tensor<Element, typename metal::msl_cooperative_extents<Layout, Coordinate>::type, Layout>;

  using msl_left_layout = msl_layout_of<MSL_LEFT, Descriptor.transpose_left ? k : m, Descriptor.transpose_left ? m : k>;
  using msl_right_layout =
      msl_layout_of<MSL_RIGHT, Descriptor.transpose_right ? n : k, Descriptor.transpose_right ? k : n>;
  template <class Left, class Right>
  using msl_destination_layout =
      msl_layout_of<MSL_DESTINATION, m, n, msl_is_in_memory<Left>(), msl_is_in_memory<Right>()>;

public:
  static constexpr matmul2d_descriptor descriptor = Descriptor;
  using scope = Scope;

  template <class LeftElement, class RightElement, class Element, class Coordinate = int>
  using cooperative_tensor_left_input_t = msl_tensor_of<LeftElement, Coordinate, msl_left_layout>;
  template <class LeftElement, class RightElement, class Element, class Coordinate = int>
  using cooperative_tensor_right_input_t = msl_tensor_of<RightElement, Coordinate, msl_right_layout>;
  template <class Left, class Right, class Element, class Coordinate = int>
  using cooperative_tensor_destination_t = msl_tensor_of<Element, Coordinate, msl_destination_layout<Left, Right>>;
  template <class Left, class Right, class Element, class Coordinate = int>
  using cooperative_tensor_row_reduction_destination_t =
      msl_tensor_of<Element, Coordinate, msl_layout_of<MSL_ROW_REDUCTION, m, n>>;
  template <class Left, class Right, class Element, class Coordinate = int>
  using cooperative_tensor_column_reduction_destination_t =
      msl_tensor_of<Element, Coordinate, msl_layout_of<MSL_COLUMN_REDUCTION, m, n>>;

  template <class LeftElement, class RightElement, class Element, class Coordinate = int>
  MSL_INLINE auto get_left_input_cooperative_tensor() const {
    msl_require_tile<Descriptor, Scope>();
    msl_require_input<Descriptor, Scope>();
    msl_require_types<LeftElement, RightElement, Element, true>();
    return cooperative_tensor_left_input_t<LeftElement, RightElement, Element, Coordinate>();
  }
  template <class LeftElement, class RightElement, class Element, class Coordinate = int>
  MSL_INLINE auto get_right_input_cooperative_tensor() const {
    msl_require_tile<Descriptor, Scope>();
    msl_require_input<Descriptor, Scope>();
    msl_require_types<LeftElement, RightElement, Element, true>();
    return cooperative_tensor_right_input_t<LeftElement, RightElement, Element, Coordinate>();
  }
  // A destination of another operation as the left input of this one.
  template <class LeftElement, class RightElement, class Element, class Coordinate = int, class SourceElement,
            class SourceExtents, class SourceLayout>
  MSL_INLINE auto
  get_left_input_cooperative_tensor(thread const cooperative_tensor<SourceElement, SourceExtents, SourceLayout> &source,
                                    MSL_LINE) const {
    msl_require_tile<Descriptor, Scope>();
    msl_require_input<Descriptor, Scope>();
    msl_require_types<LeftElement, RightElement, Element, true>();
    static_assert(SourceLayout::shape.role == MSL_DESTINATION,
                  "get_left_input_cooperative_tensor: the source must be the destination of a matmul2d");
    static_assert(SourceLayout::shape.simdgroups == 1,
                  "get_left_input_cooperative_tensor: the source needs a single simdgroup");
    static_assert(metal::is_same_v<SourceElement, LeftElement>,
                  "get_left_input_cooperative_tensor: the source's element type must equal the left input's");
    static_assert(!Descriptor.transpose_left,
                  "get_left_input_cooperative_tensor: the left input must not be transposed");
    static_assert(SourceLayout::shape.outer == m && SourceLayout::shape.inner == k,
                  "get_left_input_cooperative_tensor: the source's m and n must be m and k of this operation");
    using Input = cooperative_tensor_left_input_t<LeftElement, RightElement, Element, Coordinate>;
    return Input(source.msl_operand(), msl_line);
  }
  template <class LeftElement, class RightElement, class Element, class Coordinate = int, class SourceElement,
            class SourceExtents, class SourceLayout>
  MSL_INLINE bool
  is_compatible_as_left_input(thread const cooperative_tensor<SourceElement, SourceExtents, SourceLayout> &) const {
    return static_k && SourceLayout::shape.role == MSL_DESTINATION && SourceLayout::shape.simdgroups == 1 &&
           simdgroups == 1 && metal::is_same_v<SourceElement, LeftElement> && !Descriptor.transpose_left &&
           SourceLayout::shape.outer == m && SourceLayout::shape.inner == k;
  }

  template <class Left, class Right, class Element, class Coordinate = int>
  MSL_INLINE auto get_destination_cooperative_tensor() const {
    msl_require_destination<Left, Right, Element>();
    return cooperative_tensor_destination_t<Left, Right, Element, Coordinate>();
  }
  template <class Left, class Right, class Element, class Coordinate = int>
  MSL_INLINE auto get_row_reduction_destination_cooperative_tensor() const {
    msl_require_destination<Left, Right, Element>();
    static_assert(simdgroups == 1, "matmul2d: a reduction needs a single simdgroup");
    return cooperative_tensor_row_reduction_destination_t<Left, Right, Element, Coordinate>();
  }
  template <class Left, class Right, class Element, class Coordinate = int>
  MSL_INLINE auto get_column_reduction_destination_cooperative_tensor() const {
    msl_require_destination<Left, Right, Element>();
    static_assert(simdgroups == 1, "matmul2d: a reduction needs a single simdgroup");
    return cooperative_tensor_column_reduction_destination_t<Left, Right, Element, Coordinate>();
  }

  // Operands are variables: what is passed lives at least as long as the operation.
  template <class Left, class Right, class Destination>
  MSL_INLINE void run(thread Left &left, thread Right &right, thread Destination &destination, MSL_LINE) const {
    msl_require_tile<Descriptor, Scope>();
    constexpr bool is_const =
        metal::is_const<Left>::value || metal::is_const<Right>::value || metal::is_const<Destination>::value;
    static_assert(!is_const, "matmul2d: an operand must not be const");
    msl_require_operand_type<Left>();
    msl_require_operand_type<Right>();
    msl_require_operand_type<Destination>();
    constexpr bool in_memory = msl_is_in_memory<Left>() && msl_is_in_memory<Right>();
    msl_require_types<typename Left::value_type, typename Right::value_type, typename Destination::value_type,
                      !in_memory>();
    constexpr bool reads_memory = msl_is_in_memory<Left>() || msl_is_in_memory<Right>();
    static_assert(!static_k || MSL_MACOS >= 2602 || k % 32 == 0 || !reads_memory,
                  "matmul2d: before macOS 26.2 a static k is a multiple of 32 where an input is in memory");
    msl_require_shape<Left, msl_left_layout, MSL_LEFT>();
    msl_require_shape<Right, msl_right_layout, MSL_RIGHT>();
    msl_require_shape<Destination, msl_destination_layout<Left, Right>, MSL_DESTINATION>();
    metal::msl_multiply({(int)m, (int)n, static_k ? (int)k : -1, Descriptor.transpose_left, Descriptor.transpose_right,
                         Descriptor.relaxed_precision,
                         Descriptor.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate, simdgroups,
                         metal::msl_operand_of(left), metal::msl_operand_of(right), metal::msl_operand_of(destination)},
                        msl_line);
  }

private:
  template <class Left, class Right, class Element> static constexpr void msl_require_destination() {
    msl_require_tile<Descriptor, Scope>();
    msl_require_operand_type<Left>();
    msl_require_operand_type<Right>();
    constexpr bool in_memory = msl_is_in_memory<Left>() && msl_is_in_memory<Right>();
    msl_require_types<typename Left::value_type, typename Right::value_type, Element, !in_memory>();
  }
  template <class Operand, class Layout, msl_tensor_role Role> static constexpr void msl_require_shape() {
    if constexpr (metal::msl_is_cooperative<Operand>::value) {
      if constexpr (Role != MSL_DESTINATION) msl_require_input<Descriptor, Scope>();
      using Given = typename Operand::layout;
      static_assert(Given::shape.role == Role, "matmul2d: a cooperative tensor was made for another operand");
      static_assert(Given::shape.outer == Layout::shape.outer && Given::shape.inner == Layout::shape.inner,
                    "matmul2d: a cooperative tensor has the sizes of another operation");
      static_assert(Given::shape.simdgroups == Layout::shape.simdgroups,
                    "matmul2d: a cooperative tensor was made for another scope");
      static_assert(Given::left_in_memory == Layout::left_in_memory &&
                        Given::right_in_memory == Layout::right_in_memory,
                    "matmul2d: the destination was made for other kinds of operands");
    } else {
      static_assert(!metal::is_const<typename Operand::element_type>::value,
                    "matmul2d: a tensor's elements must not be const, even if they are only read");
      static_assert(Operand::get_rank() == 2, "matmul2d: a tensor has rank 2");
      constexpr size_t inner = Operand::get_static_extent(0), outer = Operand::get_static_extent(1);
      static_assert((inner == metal::dynamic_extent || inner >= Layout::shape.inner) &&
                        (outer == metal::dynamic_extent || outer >= Layout::shape.outer),
                    "matmul2d: a static extent is smaller than the tile, which is read to its end");
    }
  }
};
} // namespace tensor_ops
} // namespace mpp
