// Elementary functions by the special function unit (PTX ISA, chapter 9.7.3), with denormals flushed as on Apple GPUs.
// msl/math.h names clang's builtins, which would be calls of a library that no GPU has: their names are redirected.
//
// Errors (PTX ISA): ex2.approx 2 ulp; lg2.approx 2^-22, absolute in [0.5, 2] and relative elsewhere; sin and cos 2^-20.9
// absolute within a period of 0. tanh: 2^-22 absolute, by exp2 and a correctly rounded division.
#pragma once

namespace metal {
MSL_INLINE float msl_exp2(float x) { return __nvvm_ex2_approx_ftz_f(x); }
MSL_INLINE float msl_log2(float x) { return __nvvm_lg2_approx_ftz_f(x); }
MSL_INLINE float msl_exp(float x) { return msl_exp2(x * M_LOG2E_F); }
MSL_INLINE float msl_log(float x) { return msl_log2(x) * M_LN2_F; }
MSL_INLINE float msl_log10(float x) { return msl_log2(x) * (M_LN2_F / M_LN10_F); }
MSL_INLINE float msl_pow(float x, float y) { return msl_exp2(y * msl_log2(x)); }
MSL_INLINE float msl_sqrt(float x) { return __nvvm_sqrt_rn_f(x); }
MSL_INLINE float msl_sin(float x) { return __nvvm_sin_approx_f(x); }
MSL_INLINE float msl_cos(float x) { return __nvvm_cos_approx_f(x); }
MSL_INLINE float msl_tan(float x) { return msl_sin(x) / msl_cos(x); }
MSL_INLINE float msl_sinh(float x) { return 0.5f * (msl_exp(x) - msl_exp(-x)); }
MSL_INLINE float msl_cosh(float x) { return 0.5f * (msl_exp(x) + msl_exp(-x)); }
MSL_INLINE float msl_tanh(float x) {
  // exp(2 x) is infinite from 44.4 on, where tanh is 1; the quotient is then 0.
  return 1.0f - 2.0f / (msl_exp(2.0f * x) + 1.0f);
}
MSL_INLINE float msl_fmod(float x, float y) { return x - y * __builtin_truncf(x / y); }
MSL_INLINE float msl_fma(float x, float y, float z) { return __nvvm_fma_rn_f(x, y, z); }
MSL_INLINE double msl_fma(double x, double y, double z) { return __nvvm_fma_rn_d(x, y, z); }
} // namespace metal

#define __builtin_exp2f msl_exp2
#define __builtin_expf msl_exp
#define __builtin_log2f msl_log2
#define __builtin_logf msl_log
#define __builtin_log10f msl_log10
#define __builtin_powf msl_pow
#define __builtin_sqrtf msl_sqrt
#define __builtin_sinf msl_sin
#define __builtin_cosf msl_cos
#define __builtin_tanf msl_tan
#define __builtin_sinhf msl_sinh
#define __builtin_coshf msl_cosh
#define __builtin_tanhf msl_tanh
#define __builtin_fmodf msl_fmod
#define __builtin_fmaf msl_fma
#define __builtin_fma msl_fma
