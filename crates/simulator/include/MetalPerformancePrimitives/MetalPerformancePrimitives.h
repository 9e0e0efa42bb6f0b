// Stand-in for MetalPerformancePrimitives of Metal 4: matmul2d and its cooperative tensors. mpp/*.h holds for every
// target, mpp/cpu/*.h is the simulator's.
#pragma once
#pragma clang system_header
#include "mpp/cpu/runtime.h"
#define MSL_TENSOR_REQUIRE(condition, line, text)                                                                      \
  do {                                                                                                                 \
    if (!(condition)) msl_fail(line, text);                                                                            \
  } while (0)
#include "metal_cooperative_tensor"
#include "mpp/descriptor.h"
#include "mpp/rules.h"
#include "mpp/cpu/matmul2d.h"
#include "mpp/cpu/reduction.h"
