// y = act(x W^T + bias) + residual for packed weights.
//
// Each output is one chain of accumulations in the order of K, by the same instructions for every number of rows: the
// bits of a row do not depend on the rows beside it, on the threads, or on how the work was cut. A weight in segments has
// one such chain per segment of K, and their sums are added as a binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
// Ranks that hold 8 / n segments each, and add their sums as the rest of that tree, get the bits of one that holds all.
#pragma once

#include <cstdint>

#include "base/types.h"
#include "ops/pack.h"
#include "ops/table.h"

namespace ml {

/// bounded: (up + 1) * gate * sigmoid(alpha * gate) with the gate at most `limit` and up within it on both sides, where
/// alpha and limit are the weight's (PackedWeight::bounds).
enum class Activation : int32_t { none = 0, silu = 1, gelu_tanh = 2, gelu_erf = 3, relu = 4, bounded = 5 };

/// What happens to a sum before it is rounded to the output type. For a gated weight the result is act(gate) * up.
struct Epilogue {
  /// [N] in the order of the weight's source rows (gated: gate, then up); null: the weight's own, if it has one.
  const float* bias = nullptr;
  const void* residual = nullptr;  ///< [M, columns] of the type of y, may be y itself
  int64_t ld_residual = 0;
  Activation act = Activation::none;

  Epilogue from_row(int64_t row, DType y_type) const {
    Epilogue part = *this;
    if (residual != nullptr) part.residual = static_cast<const char*>(residual) + row * ld_residual * bytes_of(y_type);
    return part;
  }
};

/// Rows of x in the form in which the kernels of one weight read them.
struct PreparedRows {
  const void* data;
  DType type;
  int64_t ld_bytes;

  PreparedRows from_row(int64_t row) const { return {static_cast<const char*>(data) + row * ld_bytes, type, ld_bytes}; }
};

constexpr int64_t kTileRows = 96;  ///< most rows of a tile

/// How one kind of weight is multiplied.
struct TileOps {
  /// Bytes of a prepared row, or 0 when rows of `x_type` are read as they are.
  int64_t (*prepared_bytes)(const PackedWeight& w, DType x_type);
  /// Converts `rows` rows into `out` (which has the type of the result).
  PreparedRows (*prepare)(const PackedWeight& w, PreparedRows x, int64_t rows, void* out);
  /// out[rows][32] = x times one panel.
  void (*tile)(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out);
};

/// The output of a product.
struct Output {
  void* data;
  DType type;  ///< f32, bf16 or f16
  int64_t ld;  ///< elements

  Output from_row(int64_t row) const { return {static_cast<char*>(data) + row * ld * bytes_of(type), type, ld}; }
};

struct GemmTable {
  TileOps f32, bf16;
  /// Applies the epilogue to tile[rows][32] of a panel and writes the panel's columns of y.
  void (*finish)(const PackedWeight& w, int64_t panel, const float* tile, int64_t rows, const Output& y,
                 const Epilogue& epilogue);
};

/// x [m, K] (f32, bf16 or f16; rows `ldx` elements apart), y [m, columns] (f32, bf16 or f16).
void gemm(const PackedWeight& w, const void* x, DType x_type, int64_t ldx, void* y, DType y_type, int64_t ldy,
          int64_t m, const Epilogue& epilogue);

/// The kernels of w's kind for the instruction set in use.
const TileOps& tile_ops(const PackedWeight& w);

/// x ready for w's kernels: x itself, or a copy in `out`, which holds m * prepared_bytes. One thread.
PreparedRows prepare_rows(const PackedWeight& w, const void* x, DType x_type, int64_t ldx, int64_t m, void* out);

/// The columns of panels [begin, end) for all `rows` of x, by the calling thread alone: for callers that share out the
/// work themselves, such as the experts of a mixture.
void gemm_panels(const PackedWeight& w, int64_t begin, int64_t end, PreparedRows x, int64_t rows, const Output& y,
                 const Epilogue& epilogue);

}  // namespace ml

ML_DECLARE_TABLE(GemmTable, gemm)
