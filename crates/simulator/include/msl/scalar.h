// Scalar types, literals and limits (Metal Shading Language specification, chapter 2.1).
#pragma once

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;

constexpr half operator""h(long double value) { return (half)value; }
constexpr half operator""h(unsigned long long value) { return (half)value; }
constexpr bfloat operator""bf(long double value) { return (bfloat)(float)value; }

// Specification, table 6.5 ff.: constants of single and half precision.
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HUGE_VALF __builtin_inff()
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXHALF ((half)65504.0f)
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)0x1p-14f)
#define HALF_EPSILON ((half)0x1p-10f)
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define ULONG_MAX 18446744073709551615ul

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))
// Inlined into the kernel, so that accesses carry the line of the kernel that made them.
#define MSL_INLINE inline __attribute__((always_inline))
// The line of the caller, as a last default argument.
#define MSL_LINE int msl_line = __builtin_LINE()

namespace metal {
template <class T> struct numeric_limits;

#define MSL_FLOAT_LIMITS(T, MAX, MIN, EPSILON, DIGITS)                                                                 \
  template <> struct numeric_limits<T> {                                                                               \
    static constexpr int digits = DIGITS;                                                                              \
    static constexpr T max() { return MAX; }                                                                           \
    static constexpr T min() { return MIN; }                                                                           \
    static constexpr T lowest() { return -MAX; }                                                                       \
    static constexpr T epsilon() { return EPSILON; }                                                                   \
    static constexpr T infinity() { return (T)__builtin_inff(); }                                                      \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }                                                   \
  };
MSL_FLOAT_LIMITS(float, 0x1.fffffep127f, 0x1p-126f, 0x1p-23f, 24)
MSL_FLOAT_LIMITS(half, (half)65504.0f, (half)0x1p-14f, (half)0x1p-10f, 11)
MSL_FLOAT_LIMITS(bfloat, (bfloat)0x1.fep127f, (bfloat)0x1p-126f, (bfloat)0x1p-7f, 8)

#define MSL_INTEGER_LIMITS(T, SIGNED)                                                                                  \
  template <> struct numeric_limits<T> {                                                                               \
    static constexpr T max() { return (T)(SIGNED ? (1ull << (sizeof(T) * 8 - 1)) - 1 : ~0ull); }                       \
    static constexpr T min() { return (T)(SIGNED ? 1ull << (sizeof(T) * 8 - 1) : 0ull); }                              \
    static constexpr T lowest() { return min(); }                                                                      \
  };
MSL_INTEGER_LIMITS(char, true)
MSL_INTEGER_LIMITS(int8_t, true)
MSL_INTEGER_LIMITS(uchar, false)
MSL_INTEGER_LIMITS(short, true)
MSL_INTEGER_LIMITS(ushort, false)
MSL_INTEGER_LIMITS(int, true)
MSL_INTEGER_LIMITS(uint, false)
MSL_INTEGER_LIMITS(long, true)
MSL_INTEGER_LIMITS(ulong, false)
} // namespace metal
