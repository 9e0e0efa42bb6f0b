// Floats as tf32 numbers.
#pragma once

namespace metal {
// x = high + low: high is rounded to nearest, and low has one bit that the unit ignores. Of NaN, low is NaN.
MSL_INLINE void msl_split(float x, thread uint &high, thread uint &low) {
  high = (__builtin_bit_cast(uint, x) + 0x1000u) & ~0x1fffu;
  low = __builtin_bit_cast(uint, x - __builtin_bit_cast(float, high));
}
} // namespace metal
