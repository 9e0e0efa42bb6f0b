// The runtime that is linked into every kernel library, as one translation unit. -DMSL_CHECK_LAYER=1 adds the checker.
#include "context.h"

#include "fiber.cc"
#include "operations.cc"
#include "matrix.cc"
#if MSL_CHECK_LAYER
#include "checker.cc"
#endif
#include "layout.cc"
#include "matmul2d.cc"
#include "launch.cc"
#include "compiler_rt.cc"
