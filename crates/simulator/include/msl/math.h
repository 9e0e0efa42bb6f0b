// Functions of <metal_math>, <metal_integer>, <metal_relational>, <metal_common>, <metal_geometric>
// (specification, chapters 6.3 to 6.7). Half and bfloat are computed in float and rounded once.
#pragma once

namespace metal {
// one argument
#define MSL_UNARY(name, expression)                                                                                    \
  MSL_INLINE float name(float x) { return expression; }                                                                \
  MSL_INLINE half name(half x) { return (half)name((float)x); }                                                        \
  MSL_INLINE bfloat name(bfloat x) { return (bfloat)name((float)x); }                                                  \
  MSL_FOR_VECTORS(V) V name(V x) {                                                                                     \
    V result;                                                                                                          \
    for (int i = 0; i < msl_components<V>; ++i) result[i] = name((msl_scalar<V>)x[i]);                                 \
    return result;                                                                                                     \
  }
#define MSL_UNARY_WITH_FAST_FORM                                                                                       \
  MSL_UNARY(exp, __builtin_expf(x))                                                                                    \
  MSL_UNARY(exp2, __builtin_exp2f(x))                                                                                  \
  MSL_UNARY(exp10, __builtin_exp2f(x * 3.32192809488736234787f))                                                       \
  MSL_UNARY(log, __builtin_logf(x))                                                                                    \
  MSL_UNARY(log2, __builtin_log2f(x))                                                                                  \
  MSL_UNARY(log10, __builtin_log10f(x))                                                                                \
  MSL_UNARY(sqrt, __builtin_sqrtf(x))                                                                                  \
  MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                                                                          \
  MSL_UNARY(sin, __builtin_sinf(x))                                                                                    \
  MSL_UNARY(cos, __builtin_cosf(x))                                                                                    \
  MSL_UNARY(tan, __builtin_tanf(x))                                                                                    \
  MSL_UNARY(sinh, __builtin_sinhf(x))                                                                                  \
  MSL_UNARY(cosh, __builtin_coshf(x))                                                                                  \
  MSL_UNARY(tanh, __builtin_tanhf(x))                                                                                  \
  MSL_UNARY(fabs, __builtin_fabsf(x))                                                                                  \
  MSL_UNARY(ceil, __builtin_ceilf(x))                                                                                  \
  MSL_UNARY(floor, __builtin_floorf(x))                                                                                \
  MSL_UNARY(trunc, __builtin_truncf(x))                                                                                \
  MSL_UNARY(rint, __builtin_rintf(x))                                                                                  \
  MSL_UNARY(round, __builtin_roundf(x))                                                                                \
  MSL_UNARY(fract, x - __builtin_floorf(x))                                                                            \
  MSL_UNARY(saturate, x < 0.0f ? 0.0f : x < 1.0f ? x : 1.0f)                                                           \
  MSL_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
MSL_UNARY_WITH_FAST_FORM

// two arguments; max and min of a NaN and a number are the number (specification, 6.5)
#define MSL_BINARY(name, expression)                                                                                   \
  MSL_INLINE float name(float x, float y) { return expression; }                                                       \
  MSL_INLINE half name(half x, half y) { return (half)name((float)x, (float)y); }                                      \
  MSL_INLINE bfloat name(bfloat x, bfloat y) { return (bfloat)name((float)x, (float)y); }                              \
  MSL_FOR_VECTORS(V) V name(V x, V y) {                                                                                \
    V result;                                                                                                          \
    for (int i = 0; i < msl_components<V>; ++i) result[i] = name((msl_scalar<V>)x[i], (msl_scalar<V>)y[i]);            \
    return result;                                                                                                     \
  }
#define MSL_BINARY_WITH_FAST_FORM                                                                                      \
  MSL_BINARY(pow, __builtin_powf(x, y))                                                                                \
  MSL_BINARY(powr, __builtin_powf(x, y))                                                                               \
  MSL_BINARY(fmod, __builtin_fmodf(x, y))                                                                              \
  MSL_BINARY(atan2, __builtin_atan2f(x, y))                                                                            \
  MSL_BINARY(divide, x / y)                                                                                            \
  MSL_BINARY(copysign, __builtin_copysignf(x, y))                                                                      \
  MSL_BINARY(fmax, __builtin_fmaxf(x, y))                                                                              \
  MSL_BINARY(fmin, __builtin_fminf(x, y))                                                                              \
  MSL_BINARY(max, __builtin_fmaxf(x, y))                                                                               \
  MSL_BINARY(min, __builtin_fminf(x, y))
MSL_BINARY_WITH_FAST_FORM

// fma rounds once: the product of two halves is exact in float, the sum is rounded in double first.
MSL_INLINE float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
MSL_INLINE half fma(half x, half y, half z) { return (half)__builtin_fma((double)x, (double)y, (double)z); }
MSL_INLINE bfloat fma(bfloat x, bfloat y, bfloat z) { return (bfloat)__builtin_fmaf((float)x, (float)y, (float)z); }
MSL_FOR_VECTORS(V) V fma(V x, V y, V z) {
  V result;
  for (int i = 0; i < msl_components<V>; ++i) result[i] = fma((msl_scalar<V>)x[i], (msl_scalar<V>)y[i], (msl_scalar<V>)z[i]);
  return result;
}

namespace fast {
MSL_UNARY_WITH_FAST_FORM
MSL_BINARY_WITH_FAST_FORM
} // namespace fast
namespace precise {
MSL_UNARY_WITH_FAST_FORM
MSL_BINARY_WITH_FAST_FORM
} // namespace precise

// integers
#define MSL_INTEGER(T)                                                                                                 \
  MSL_INLINE constexpr T max(T x, T y) { return x < y ? y : x; }                                                       \
  MSL_INLINE constexpr T min(T x, T y) { return y < x ? y : x; }                                                       \
  MSL_INLINE constexpr T popcount(T x) { return (T)__builtin_popcountll((unsigned long long)x & (~0ull >> (64 - 8 * sizeof(T)))); } \
  MSL_INLINE constexpr T clz(T x) {                                                                                    \
    return x == 0 ? (T)(8 * sizeof(T))                                                                                 \
                  : (T)(__builtin_clzll((unsigned long long)x & (~0ull >> (64 - 8 * sizeof(T)))) - (64 - 8 * (int)sizeof(T))); \
  }                                                                                                                    \
  MSL_INLINE constexpr T ctz(T x) { return x == 0 ? (T)(8 * sizeof(T)) : (T)__builtin_ctzll((unsigned long long)x); }
MSL_INTEGER(char)
MSL_INTEGER(int8_t)
MSL_INTEGER(uchar)
MSL_INTEGER(short)
MSL_INTEGER(ushort)
MSL_INTEGER(int)
MSL_INTEGER(uint)
MSL_INTEGER(long)
MSL_INTEGER(ulong)
MSL_INLINE constexpr int abs(int x) { return x < 0 ? -x : x; }
MSL_INLINE constexpr long abs(long x) { return x < 0 ? -x : x; }
MSL_INLINE constexpr short abs(short x) { return x < 0 ? -x : x; }
MSL_INLINE constexpr uint abs(uint x) { return x; }
MSL_INLINE constexpr ulong abs(ulong x) { return x; }
MSL_INLINE float abs(float x) { return __builtin_fabsf(x); }
MSL_INLINE half abs(half x) { return (half)__builtin_fabsf((float)x); }
MSL_INLINE bfloat abs(bfloat x) { return (bfloat)__builtin_fabsf((float)x); }
MSL_FOR_VECTORS(V) V abs(V x) {
  V result;
  for (int i = 0; i < msl_components<V>; ++i) result[i] = abs((msl_scalar<V>)x[i]);
  return result;
}
MSL_INLINE int mulhi(int x, int y) { return (int)((long)x * y >> 32); }
MSL_INLINE uint mulhi(uint x, uint y) { return (uint)((ulong)x * y >> 32); }

// three arguments
template <class T> MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> MSL_INLINE T max3(T x, T y, T z) { return max(max(x, y), z); }
template <class T> MSL_INLINE T min3(T x, T y, T z) { return min(min(x, y), z); }
template <class T> MSL_INLINE T mix(T x, T y, T a) { return x + (y - x) * a; }

// relations
#define MSL_FLOAT_TEST(name, expression)                                                                               \
  MSL_INLINE bool name(float x) { return expression; }                                                                 \
  MSL_INLINE bool name(half x) { return name((float)x); }                                                              \
  MSL_INLINE bool name(bfloat x) { return name((float)x); }                                                            \
  template <class T, int N> MSL_INLINE msl_bool_vector<N> name(vec<T, N> x) {                                          \
    msl_bool_vector<N> result;                                                                                         \
    for (int i = 0; i < N; ++i) result[i] = name((T)x[i]);                                                             \
    return result;                                                                                                     \
  }
MSL_FLOAT_TEST(isnan, x != x)
MSL_FLOAT_TEST(isinf, __builtin_fabsf(x) == __builtin_inff())
MSL_FLOAT_TEST(isfinite, __builtin_fabsf(x) < __builtin_inff())
MSL_FLOAT_TEST(signbit, __builtin_signbit(x))
template <class T, class = enable_if_t<msl_components<T> == 1>> MSL_INLINE constexpr T select(T x, T y, bool second) {
  return second ? y : x;
}
template <class T, int N> MSL_INLINE vec<T, N> select(vec<T, N> x, vec<T, N> y, msl_bool_vector<N> second) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = second[i] ? y[i] : x[i];
  return result;
}
template <class T, class M, int N> MSL_INLINE vec<T, N> select(vec<T, N> x, vec<T, N> y, vec<M, N> second) {
  return select(x, y, msl_bool_vector<N>(second));
}
template <int N> MSL_INLINE bool any(msl_bool_vector<N> v) {
  bool result = false;
  for (int i = 0; i < N; ++i) result |= v[i];
  return result;
}
template <int N> MSL_INLINE bool all(msl_bool_vector<N> v) {
  bool result = true;
  for (int i = 0; i < N; ++i) result &= v[i];
  return result;
}
template <class T, int N> MSL_INLINE bool any(vec<T, N> v) { return any(msl_bool_vector<N>(v)); }
template <class T, int N> MSL_INLINE bool all(vec<T, N> v) { return all(msl_bool_vector<N>(v)); }

// geometry
template <class T, int N> MSL_INLINE T dot(vec<T, N> x, vec<T, N> y) {
  T sum = x[0] * y[0];
  for (int i = 1; i < N; ++i) sum += x[i] * y[i];
  return sum;
}
template <class T, int N> MSL_INLINE T length_squared(vec<T, N> x) { return dot(x, x); }
template <class T, int N> MSL_INLINE T length(vec<T, N> x) { return sqrt(dot(x, x)); }
} // namespace metal
