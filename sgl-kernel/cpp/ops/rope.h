// From the fused projection to attention: normalise and rotate q and k per head, put k and v into their pages.
#pragma once

#include <cstdint>

#include "base/types.h"
#include "ops/kv_view.h"
#include "ops/table.h"

namespace ml {

/// RMSNorm of the first `dim` numbers of each head. Null weight: none.
struct HeadNorm {
  const void* weight;  // [dim]
  DType type;  // of the weight. The tokens' own: round the normalised number, then multiply. Else round once, at last
  int32_t dim;
};

/// cos and sin by table row; out = x * cos + swapped(x) * sin. Null cos: no rotation.
/// A table of the tokens' type rounds x * cos before the sum, as tensors of that type would.
struct RopeTable {
  const void* cos;
  const void* sin;
  DType type;
  int64_t stride;            // numbers from row to row
  const int32_t* positions;  // [T] table rows; null: token i has row i
  int32_t begin;             // the first rotated dimension
  int32_t dim;               // how many are rotated, even
  bool full;         // a row has `dim` columns, the sines of the first of each pair negated; else dim / 2 columns
  bool interleaved;  // pairs (2j, 2j + 1); else (j, j + dim / 2)
};

struct RopeCall {
  const void* q;                                       // [T, H, head_dim]; null: keys and values only
  const void* k;                                       // [T, K, key_dim]
  const void* v;                                       // [T, K, value_dim]; null: none is stored (MLA)
  void* q_out;                                         // may be q
  DType dtype;                                         // of all four: f32, bf16 or f16
  int64_t q_stride, k_stride, v_stride, q_out_stride;  // elements from token to token
  int32_t q_heads;
  int32_t head_dim;
  float eps;
  HeadNorm q_norm, k_norm;
  RopeTable rope;
  KvView kv;
  const int32_t* store_page;    // [T] the page of each token's keys and values,
  const int32_t* store_offset;  // [T] and its place in it
  int64_t tokens;
};

struct RopeKernels {
  void (*run)(const RopeCall&, int64_t first, int64_t last);
};

constexpr int kMostHeadDim = 1024;

/// On the thread pool. Throws std::invalid_argument for types or sizes it cannot do.
void rope_store(const RopeCall& call);

}  // namespace ml

ML_DECLARE_TABLE(RopeKernels, rope)
