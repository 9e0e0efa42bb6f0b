// Conversions that clang calls and libgcc has only from version 13 on.
extern "C" {
__attribute__((weak)) __bf16 __truncsfbf2(float value) {
  value = rounded(value, MSL_BFLOAT);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t upper = (uint16_t)(bits >> 16);
  __bf16 result;
  memcpy(&result, &upper, 2);
  return result;
}
__attribute__((weak)) __bf16 __truncdfbf2(double value) { return __truncsfbf2((float)value); }
}
