// Operations on the rows of an activation matrix: norms, gated activations, embedding. Half precision is rounded to
// nearest even where python/moonlang/layers rounds it; in between everything is float32.
#pragma once

#include "base/types.h"
#include "ops/table.h"

namespace ml {

enum class NormForm : int32_t {
  llama,  // y = round(round(x / rms(x)) * w), w of x's type
  gemma,  // y = round(x / rms(x) * w), w float32 with the one already added
};

enum class NormSum : int32_t {
  none,    // y = norm(x)
  before,  // residual += x, y = norm(residual): what stands between two blocks of a pre-norm model
  after,   // residual += norm(x): what ends a block of a sandwich-norm model
};

struct RmsNorm {
  DType type;  // of x, residual and y: f32, bf16 or f16
  NormForm form;
  NormSum sum;
  float eps;
  int64_t dim;
  const void* weight;  // [dim]
  const void* x;       // [rows, dim], rows ldx elements apart
  int64_t ldx;
  void* residual;  // [rows, dim], not used with NormSum::none
  int64_t ld_residual;
  void* y;  // [rows, dim], may be x; not used with NormSum::after
  int64_t ldy;
};

enum class Gate : int32_t { silu, gelu_tanh, gelu_erf, relu };

/// y = act(left half of x) * right half of x. x: [rows, 2 * dim], y: [rows, dim].
struct GatedAct {
  DType type;
  Gate gate;
  int64_t dim;
  const void* x;
  int64_t ldx;
  void* y;
  int64_t ldy;
};

/// y[i] = table[ids[i]] * scale. table: [vocab, dim]; scale 1 copies.
struct Embedding {
  DType type;
  float scale;
  int64_t dim;
  const void* table;
  int64_t ld_table;
  const int64_t* ids;  // [rows]
  void* y;
  int64_t ldy;
};

struct RowOps {  // each for rows [first, last)
  void (*rms_norm)(const RmsNorm&, int64_t first, int64_t last);
  void (*gated)(const GatedAct&, int64_t first, int64_t last);
  void (*embedding)(const Embedding&, int64_t first, int64_t last);
};

/// All rows, on the thread pool when there is enough to do.
void rms_norm(const RmsNorm& op, int64_t rows);
void gated(const GatedAct& op, int64_t rows);
void embedding(const Embedding& op, int64_t rows);

}  // namespace ml

ML_DECLARE_TABLE(RowOps, rowops)
