// Bounding scores smoothly, as Gemma 2 does with its logits.
#pragma once

#include <cstdint>

#include "ops/table.h"

namespace ml {

struct SoftcapTable {
  void (*run)(float* x, int64_t count, float cap);
};

/// x = cap * tanh(x / cap) for rows [count, columns], in place, on the thread pool.
void softcap(float* x, int64_t count, int64_t columns, float cap);

}  // namespace ml

ML_DECLARE_TABLE(SoftcapTable, softcap)
