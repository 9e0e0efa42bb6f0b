// metal::array (specification, chapter 2.12): what strides are given in and positions come back in.
#pragma once

namespace metal {
template <class T, size_t N> struct array {
  T msl_values[N];
  MSL_INLINE constexpr T &operator[](size_t i) { return msl_values[i]; }
  MSL_INLINE constexpr const T &operator[](size_t i) const { return msl_values[i]; }
  static MSL_INLINE constexpr size_t size() { return N; }
};
template <class T, class... More> array(T, More...) -> array<T, 1 + sizeof...(More)>;
} // namespace metal
