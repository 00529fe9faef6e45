// The functions of simd/vec.h over arrays, so that tests can hold them to the accuracy they claim.
#pragma once

#include <cstdint>

#include "ops/table.h"

namespace ml {

/// y[i] = f(x[i]) for i < n.
struct MathTable {
  using Function = void (*)(const float* x, float* y, int64_t n);
  Function exp, sigmoid, silu, tanh, gelu_erf, gelu_tanh;
};

}  // namespace ml

ML_DECLARE_TABLE(MathTable, math)
