// The sums of all ranks into one: the last levels of the tree of gemm.h, and what a product does with its sum.
#pragma once

#include <cstdint>

#include "base/ranks.h"
#include "base/types.h"
#include "ops/gemm.h"
#include "ops/table.h"

namespace ml {

constexpr int kMostParts = 8;

/// One row: the sums of `count` ranks (a power of two up to kMostParts), float32.
struct Parts {
  const float* part[kMostParts];
  int count;
};

struct ReduceTable {
  /// out[columns] of `type` = tree(parts) + bias + residual; bias and residual may be null.
  void (*finish)(const Parts& parts, int64_t columns, const float* bias, const void* residual, DType type, void* out);
};

/// out [rows, columns], `ld` elements apart = (sum over the ranks of their x W^T) + bias + residual, for a weight whose K
/// is this rank's share. Every rank gets the same bits.
void reduced_gemm(Ranks& ranks, const PackedWeight& w, const void* x, int64_t ldx, void* out, int64_t ld, DType type,
                  int64_t rows, const Epilogue& epilogue);

}  // namespace ml

ML_DECLARE_TABLE(ReduceTable, reduce)
