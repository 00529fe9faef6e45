// Mixtures of experts: gating, and the experts' products over the tokens that chose them.
//
// Gating is that of python/moonlang/moe/topk.py. A token's result is the sum over its experts in the order of its list,
// and each expert's product has the bits of ops/gemm.h: nothing depends on which tokens share an expert or a batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/pieces.h"
#include "base/ranks.h"
#include "ops/exchange.h"
#include "ops/experts.h"
#include "ops/gemm.h"
#include "ops/table.h"

namespace ml {

constexpr int64_t kMaxExperts = 1024;

struct Gating {
  int64_t experts_per_token = 1;
  bool normalise = false;  // divide the chosen weights by their sum
  bool sigmoid = false;    // scores are sigmoids, not a softmax
  float scale = 1.0f;
  int64_t groups = 1;  // of experts; chosen from are the `groups_kept` best
  int64_t groups_kept = 1;
};

/// Rows [first, last): weights and experts [rows, experts_per_token] from logits [rows, experts]. bias: [experts] or
/// null.
struct GatingRows {
  const Gating* gating;
  const float* logits;
  const float* bias;
  int64_t experts;
  float* weights;
  int32_t* chosen;
};

/// y[t] = sum over j of weights[t, j] * z[t, j], then + shared_weight[t] * shared[t], then + residual[t]; one
/// rounding.
struct Combine {
  DType type;  // of z, shared, residual and y
  int64_t columns, per_token;
  const float* weights;        // [T, per_token]
  const void* const* z;        // [T, per_token] rows [columns]
  const void* shared;          // [T, columns] or null
  const float* shared_logits;  // [T]: the shared expert's weight is their sigmoid; null: 1
  const void* residual;        // or null
  int64_t ld_residual;
  void* y;
  int64_t ldy;
};

struct MoeOps {
  void (*top_experts)(const GatingRows&, int64_t first, int64_t last);
  void (*combine)(const Combine&, int64_t first, int64_t last);
};

/// The weights of one layer that stay.
struct MoeWeights {
  PackedWeight router;                    // [E, M]
  std::vector<float> router_bias;         // [E], or empty
  std::vector<PackedWeight> shared;       // of the expert that every token visits: gate_up, down; or empty
  std::vector<PackedWeight> shared_gate;  // [1, M], or empty: its weight is 1
};

/// The experts of one layer that are on this rank.
struct HeldExperts {
  std::shared_ptr<const Placement> placement;  // of all; null where nothing travels: each rank has its share
  std::vector<PackedWeight> gate_up;           // by slot [2F, M], gated
  std::vector<PackedWeight> down;              // by slot [M, F]
};

class Moe {
 public:
  /// ranks: each holds its share (share_begin) of the experts, computes those, and gets the products of the others before
  /// they are combined: every rank gets the bits of one that holds all. null: this one does.
  ///
  /// lanes: exchanges among the same ranks, over which each has its share of the tokens computed where the experts are
  /// placed, and gets the results of all; same bits. With two of them one half of the tokens travels while the other is
  /// computed. Empty: none travels, since all ranks have them all.
  ///
  /// own_tokens: every rank has other tokens (or none), and nobody gets the results of others. peers: ranks that
  /// have the same tokens, equally many for every rank: each sees to its share of them, and gets the results of all.
  /// null: nobody has.
  ///
  /// Copies of a Moe have their experts in common. Throws std::invalid_argument when the shapes do not go together.
  Moe(MoeWeights weights, HeldExperts held, const Gating& gating, Activation act,
      std::shared_ptr<Ranks> ranks = nullptr, std::vector<std::shared_ptr<Exchange>> lanes = {},
      bool own_tokens = false, std::shared_ptr<Ranks> peers = nullptr);

  /// Goes on with these experts; all ranks do so between the same two runs, with the same placement. Throws
  /// std::invalid_argument as the constructor does, and keeps what it has then.
  void hold(HeldExperts held);

  /// How often each expert [E] was chosen since the last call, by the tokens that this rank sees to.
  std::vector<int64_t> take_counts();

  /// y = moe(x) + residual. x, y: [rows, M] of `type` (f32, bf16, f16), ld elements apart; residual null: none; y may
  /// be the residual but not x. Uses scratch slot 2 of the calling thread. Ranks with own_tokens run it equally often,
  /// also with no rows.
  void run(const void* x, int64_t ldx, void* y, int64_t ldy, const void* residual, int64_t ld_residual, DType type,
           int64_t rows) const;

  int64_t size() const { return weights_.router.k; }
  bool own_tokens() const { return own_tokens_; }

 private:
  struct Part;
  struct Routed;
  struct Shared;
  struct Half;
  struct Present {  // what changes while the layer is served
    HeldExperts held;
    std::vector<int64_t> counts;  // by expert, see take_counts
  };
  void check(const HeldExperts& held) const;
  const HeldExperts& held() const { return present_->held; }
  Experts experts() const;
  void run_part(const Part& part) const;
  void run_exchanged(const Part& part) const;
  void run_own(const Part& part, int64_t step) const;
  void run_own_round(const Part& part) const;
  int64_t most_rows(int64_t own) const;
  void run_halves(std::vector<Half>&& halves) const;
  Half begin_half(Exchange& exchange, const Part& part) const;
  void serve(const Half& half) const;
  void finish(const Half& half) const;
  static void gather_rows(Ranks& ranks, const Part& part, int64_t size);
  Routed take_routed(Pieces& pieces, int64_t rows) const;
  Shared take_shared(Pieces& pieces, DType type, int64_t rows) const;
  void route(const Part& part, const Routed& to) const;
  void run_shared(const Part& part, const Shared& to) const;
  void combine(const Part& part, const Routed& routed, const Shared& shared) const;
  int64_t share_begin_of(int rank) const;
  void gather(const std::vector<int64_t>& begin, int64_t row_bytes, char* z) const;

  MoeWeights weights_;
  Gating gating_;
  Activation act_;
  std::shared_ptr<Ranks> ranks_;
  std::vector<std::shared_ptr<Exchange>> lanes_;
  bool own_tokens_;
  std::shared_ptr<Ranks> peers_;
  std::shared_ptr<Present> present_;
};

void top_experts(const GatingRows& op, int64_t rows);

}  // namespace ml

ML_DECLARE_TABLE(MoeOps, moe)
