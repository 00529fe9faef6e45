// What this machine can do at most, for benchmarks that print achieved / limit.
#pragma once

#include <cstdint>

#include "ops/table.h"

namespace ml {

struct LimitsTable {
  /// Reads n bytes (a multiple of 256) and returns a value that depends on all of them.
  uint64_t (*read)(const void* data, int64_t n);
  /// Multiplies and adds in registers `rounds` times; *operations: how many multiplications and additions that were.
  float (*fma_f32)(int64_t rounds, int64_t* operations);
  /// The same with the bf16 dot product where the instruction set has one, else with float32.
  float (*dot_bf16)(int64_t rounds, int64_t* operations);
};

}  // namespace ml

ML_DECLARE_TABLE(LimitsTable, limits)
