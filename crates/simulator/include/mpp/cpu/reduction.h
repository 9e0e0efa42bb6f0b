// reduce_rows and reduce_columns (MPPTensorOpsReduction.h): of a destination, by a single simdgroup.
#pragma once

namespace metal {
MSL_OUT_OF_LINE inline void msl_reduce(msl_reduction_call call, int line) { msl_tensor_reduce(&call, line); }
MSL_OUT_OF_LINE inline bool msl_maps(const msl_layout *from, const msl_layout *to) { return msl_tensor_maps(from, to); }
} // namespace metal

namespace mpp {
namespace tensor_ops {
template <msl_tensor_role Role, class Element, class SourceLayout, class DestinationLayout>
constexpr void msl_require_reduction() {
  static_assert(SourceLayout::shape.simdgroups == 1 && DestinationLayout::shape.simdgroups == 1,
                "a reduction needs a single simdgroup");
  static_assert(SourceLayout::shape.role == MSL_DESTINATION, "a reduction's source is the destination of a matmul2d");
  static_assert(DestinationLayout::shape.role == Role, "a reduction's destination was made for another reduction");
  static_assert(Role == MSL_ROW_REDUCTION ? SourceLayout::shape.outer == DestinationLayout::shape.outer
                                          : SourceLayout::shape.inner == DestinationLayout::shape.inner,
                "a reduction's source and destination differ in size");
}

// The default of identity is the sum's for every operation, so that a maximum needs its own.
#define MSL_REDUCE(name, role, by_column)                                                                              \
  template <class Element, class SourceExtents, class SourceLayout, class Extents, class Layout>                       \
  MSL_INLINE void name(thread cooperative_tensor<Element, SourceExtents, SourceLayout> &source,                        \
                       thread cooperative_tensor<Element, Extents, Layout> &destination,                               \
                       reduction_operation operation = reduction_operation::sum,                                       \
                       Element identity = reduction_operation_identity<Element>::sum_identity, MSL_LINE) {             \
    msl_require_reduction<role, Element, SourceLayout, Layout>();                                                      \
    metal::msl_reduce({(uint)operation, by_column, (float)identity, source.msl_operand(), destination.msl_operand()},  \
                      msl_line);                                                                                       \
  }
MSL_REDUCE(reduce_rows, MSL_ROW_REDUCTION, 0)
MSL_REDUCE(reduce_columns, MSL_COLUMN_REDUCTION, 1)

// Whether map_iterator finds every element of `source` in `destination`.
template <class Element, class SourceExtents, class SourceLayout, class DestinationElement, class Extents, class Layout>
MSL_INLINE bool
is_iterator_compatible(thread const cooperative_tensor<Element, SourceExtents, SourceLayout> &source,
                       thread const cooperative_tensor<DestinationElement, Extents, Layout> &destination) {
  return metal::msl_maps(source.msl_layout_in_use(), destination.msl_layout_in_use());
}
} // namespace tensor_ops
} // namespace mpp
