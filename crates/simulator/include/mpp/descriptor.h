// What a matmul2d multiplies, and who (header of MetalPerformancePrimitives: MPPTensorOpsMatMul2d.h).
#pragma once

namespace mpp {
namespace tensor_ops {
struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };

  int m, n, k; // rows of the left operand, columns of the right one, and what is summed over
  bool transpose_left, transpose_right;
  bool relaxed_precision; // float operands may lose bits
  mode matmul_mode;

  constexpr matmul2d_descriptor(int m, int n, int k = static_cast<int>(metal::dynamic_extent),
                                bool transpose_left = false, bool transpose_right = false,
                                bool relaxed_precision = false, mode matmul_mode = mode::multiply)
      : m(m), n(n), k(k), transpose_left(transpose_left), transpose_right(transpose_right),
        relaxed_precision(relaxed_precision), matmul_mode(matmul_mode) {}

  constexpr bool msl_has_static_k() const { return k >= 0 && k != metal::dynamic_length_v<int>; }
};

// Who executes an operation. Of execution_simdgroups<N>, N must be all simdgroups of the threadgroup unless it is 1.
template <int Simdgroups> struct execution_simdgroups {
  static constexpr int msl_simdgroups = Simdgroups;
};
using execution_simdgroup = execution_simdgroups<1>;
struct execution_thread {
  static constexpr int msl_simdgroups = 0;
};

enum class reduction_operation { sum, max, min };
template <class T> struct reduction_operation_identity {
  static constexpr T sum_identity = T(0);
  static constexpr T max_identity = metal::numeric_limits<T>::lowest();
  static constexpr T min_identity = metal::numeric_limits<T>::max();
};

// Kernels name it to get at the type of a tensor variable.
namespace __tensor_ops_detail {
template <class T> using __remove_addrspace_t = metal::remove_addrspace_t<metal::remove_reference_t<T>>;
}
} // namespace tensor_ops
} // namespace mpp
