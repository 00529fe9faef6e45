// Products of the heads of attention, each with a weight of its own: queries into the space of latents, and results out
// of it (see python/moonlang/models/latent_attention.py).
#pragma once

#include <cstdint>
#include <vector>

#include "ops/gemm.h"

namespace ml {

/// x: [tokens, heads * (K + tail)] -> y: [tokens, heads * (N + tail)], both of `type`. Of each head the first K numbers
/// times its weight [N, K], and behind them the last `tail` numbers as they are.
struct HeadProducts {
  const void* x;
  void* y;  // not x
  DType type;
  int64_t ldx, ldy;  // elements from token to token
  int64_t tail;
};

/// On the thread pool. The bits are those of `gemm` of one head. weights: one per head, of one shape and kind, not
/// gated.
void gemm_by_head(const std::vector<PackedWeight>& weights, const HeadProducts& op, int64_t tokens);

}  // namespace ml
