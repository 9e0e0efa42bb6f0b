// What matmul2d takes: types of elements and sizes of tiles. MSL_MACOS is the version of macOS whose headers are
// played, 2602 for 26.2.
//
// Types: MPPTensorOpsMatMul2d.h. Tiles: its static_asserts as kernels met them (ollama#15257: 8x8 does not compile;
// ccv's NAAttentionKernel: inner dimensions are multiples of 32 in macOS 26.1). An inner dimension of 16 is the
// smallest that a published kernel uses (MLX, steel_attention_nax.h).
#pragma once

#ifndef MSL_MACOS
#define MSL_MACOS 2602
#endif

namespace mpp {
namespace tensor_ops {
template <class T> constexpr constant bool msl_is_half = metal::is_same_v<T, half>;
template <class T> constexpr constant bool msl_is_bfloat = metal::is_same_v<T, bfloat>;
template <class T> constexpr constant bool msl_is_float = metal::is_same_v<T, float>;
template <class T> constexpr constant bool msl_is_operand = msl_is_half<T> || msl_is_bfloat<T> || msl_is_float<T>;
template <class T> constexpr constant bool msl_is_plain = metal::is_same_v<T, metal::remove_addrspace_t<T>>;

// Whether left * right -> destination is supported by some version.
template <class L, class R, class D> constexpr bool msl_types_multiply() {
  if (msl_is_float<L> || msl_is_float<R>) return msl_is_float<D>;
  if (msl_is_half<L> && msl_is_half<R>) return msl_is_half<D> || msl_is_float<D>;
  if (msl_is_bfloat<L> && msl_is_bfloat<R>) return msl_is_bfloat<D> || msl_is_float<D>;
  return msl_is_operand<D>; // half with bfloat
}
template <class L, class R, class D, bool Cooperative> constexpr void msl_require_types() {
  static_assert(msl_is_plain<L> && msl_is_plain<R> && msl_is_plain<D>,
                "matmul2d: element types come without address space and const");
  static_assert(msl_is_operand<L> && msl_is_operand<R> && msl_is_operand<D>,
                "matmul2d: half, bfloat and float elements are simulated");
  static_assert(msl_types_multiply<L, R, D>(), "matmul2d: this combination of element types is not supported");
  constexpr bool bfloats = msl_is_bfloat<L> || msl_is_bfloat<R> || msl_is_bfloat<D>;
  static_assert(!bfloats || MSL_MACOS >= 2601, "matmul2d: bfloat needs macOS 26.1");
  constexpr bool mixed = (msl_is_half<L> && msl_is_bfloat<R>) || (msl_is_bfloat<L> && msl_is_half<R>);
  static_assert(!mixed || !Cooperative,
                "matmul2d: half with bfloat in a cooperative tensor does not compile for every GPU (ollama#15862)");
}

template <matmul2d_descriptor Descriptor, class Scope> constexpr void msl_require_tile() {
  constexpr int m = Descriptor.m, n = Descriptor.n;
  static_assert(Scope::msl_simdgroups > 0, "matmul2d: execution_thread is not simulated");
  static_assert(m > 0 && n > 0 && m % 8 == 0 && n % 8 == 0 && (m % 16 == 0 || n % 16 == 0),
                "matmul2d: m and n are multiples of 8, and one of them of 16");
  static_assert(!Descriptor.msl_has_static_k() || (Descriptor.k > 0 && Descriptor.k % 16 == 0),
                "matmul2d: a static k is a multiple of 16");
}
template <matmul2d_descriptor Descriptor, class Scope> constexpr void msl_require_input() {
  static_assert(Scope::msl_simdgroups == 1, "Input cooperative tensors require a single SIMD group");
  static_assert(Descriptor.msl_has_static_k(),
                "Inner dimension cannot be dynamic when an input is a cooperative tensor");
}
} // namespace tensor_ops
} // namespace mpp
