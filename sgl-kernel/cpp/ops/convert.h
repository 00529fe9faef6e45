// Conversion of contiguous elements between float32 and the narrow floats. Also the smallest example of an op: see
// table.h.
#pragma once

#include <cstdint>

#include "base/types.h"
#include "ops/table.h"

namespace ml {

struct ConvertTable {
  /// `type`: f32, bf16, f16, fp8_e4m3, fp8_e5m2 or i8. Exact.
  void (*to_f32)(const void* from, DType type, float* to, int64_t n);
  /// `type`: f32, bf16 or f16. Rounds to nearest even.
  void (*from_f32)(const float* from, void* to, DType type, int64_t n);
};

}  // namespace ml

ML_DECLARE_TABLE(ConvertTable, convert)
