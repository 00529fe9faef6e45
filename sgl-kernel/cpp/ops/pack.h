// Weights laid out for the kernels, once at load.
//
// A weight [N, K] (torch's layout: out, in) becomes panels of 32 columns of the product, each panel one contiguous
// stream in the order of K. So M = 1 reads memory front to back, and a panel stays in L2 while many rows pass over it.
// The layout is the same on every instruction set.
//
//   f32    panel[k][32]                                      float
//   bf16   panel[k / 2][32][2]                               pairs of K side by side, as the dot product instruction
//   wants
//
// Columns beyond N and an odd K's missing partner are zero. With `gated`, the rows are [gate; up] and a panel holds 16
// columns of gate, then the same 16 of up, so that one task can compute act(gate) * up.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/arena.h"
#include "base/types.h"

namespace ml {

constexpr int64_t kPanel = 32;
constexpr int64_t kMostSegments = 8;

enum class WeightKind : int32_t { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, w8a8 = 4, fp8 = 5 };

/// Of the activation `bounded`, see gemm.h.
struct Bounds {
  float alpha = 1.0f;
  float limit = 0.0f;
};

struct PackedWeight {
  WeightKind kind = WeightKind::f32;
  bool gated = false;
  int64_t n = 0;  ///< Rows of the source; gate and up both count.
  int64_t k = 0;
  int64_t segments = 1;  ///< Equal parts of K, each summed by itself; see gemm.h. A power of two up to kMostSegments.
  int64_t panels = 0;
  int64_t panel_bytes = 0;
  int64_t bytes = 0;  ///< All of `memory`.
  std::shared_ptr<void> memory;
  std::shared_ptr<const void> extra;  ///< What a kind keeps beside the panels (scales, zero points ...).
  std::shared_ptr<const float> bias;  ///< [N], or null: see Epilogue. For those who multiply by many weights at a time.
  Bounds bounds;

  const char* panel(int64_t i) const { return static_cast<const char*>(memory.get()) + i * panel_bytes; }
  /// Columns of the product: N, or N / 2 when gated.
  int64_t columns() const { return gated ? n / 2 : n; }
  /// Columns of the product per panel.
  int64_t panel_columns() const { return gated ? kPanel / 2 : kPanel; }
  /// Source row of column `c` (0..31) of panel `i`; -1: padding.
  int64_t source_row(int64_t i, int64_t c) const;
};

/// Rows of source matrices, stacked along N: several matrices are packed as one (q, k, v; gate, up).
struct Rows {
  const void* data;
  DType type;
  int64_t rows;
  int64_t ld;  ///< Elements from one row to the next.
};

/// Shape, panel count and sizes of the f32 and bf16 kinds, without memory. Throws std::invalid_argument: a gated weight
/// with an odd N, segments that are no power of two up to 8 or not of an even number of elements each.
PackedWeight packed_shape(WeightKind kind, int64_t n, int64_t k, bool gated, int64_t segments = 1);

/// Packs f32, bf16 or f16 rows as `kind` f32 or bf16 (rounding to nearest even where narrower), in parallel.
PackedWeight pack(const std::vector<Rows>& sources, int64_t k, WeightKind kind, bool gated, Arena& arena,
                  int64_t segments = 1);

}  // namespace ml
