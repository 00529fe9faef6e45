#include "ops/moe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/pieces.h"
#include "base/pool.h"
#include "ops/moe_part.h"

namespace ml {
namespace {

// Tokens times experts per token that are computed at a time: bounds the scratch memory at some 10 KB each. Enough for
// long products, since only the tokens of one expert meet in one.
constexpr int64_t kMaxPlaces = 16384;

void need(bool right, const char* what) {
  if (!right) throw std::invalid_argument(std::string("mixture of experts: ") + what);
}

/// Whether the two are an expert of a model of this size.
bool fit(const PackedWeight& gate_up, const PackedWeight& down, int64_t size) {
  return gate_up.gated && gate_up.k == size && down.n == size && down.k == gate_up.columns();
}

/// (token, j) pairs sorted by expert, those of one expert by token. Places are positions in that order.
struct Order {
  std::vector<int64_t> begin;  // [E + 1] places
  int32_t* token;              // [places]
  int32_t* place;              // [T, per_token]

  void sort(const int32_t* chosen, int64_t tokens, int64_t per_token, int64_t experts) {
    begin.assign(size_t(experts) + 1, 0);
    for (int64_t i = 0; i < tokens * per_token; ++i) ++begin[size_t(chosen[i]) + 1];
    for (int64_t e = 0; e < experts; ++e) begin[size_t(e) + 1] += begin[size_t(e)];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < tokens * per_token; ++i) {
      const int64_t at = next[size_t(chosen[i])]++;
      token[at] = int32_t(i / per_token);
      place[i] = int32_t(at);
    }
  }
};

}  // namespace

Moe::Moe(MoeWeights weights, HeldExperts held, const Gating& gating, Activation act, std::shared_ptr<Ranks> ranks,
         std::vector<std::shared_ptr<Exchange>> lanes, bool own_tokens, std::shared_ptr<Ranks> peers)
    : weights_(std::move(weights)), gating_(gating), act_(act), ranks_(std::move(ranks)), lanes_(std::move(lanes)),
      own_tokens_(own_tokens), peers_(std::move(peers)) {
  const auto& [router, bias, shared, shared_gate] = weights_;
  const int64_t experts = router.n, size = router.k;
  need(experts >= 1 && experts <= kMaxExperts, "between 1 and 1024 experts");
  need(gating.experts_per_token >= 1 && gating.experts_per_token <= experts, "experts_per_token is out of range");
  need(gating.groups >= 1 && experts % gating.groups == 0, "the groups must divide the experts");
  need(gating.groups_kept >= 1 && gating.groups_kept <= gating.groups, "groups_kept is out of range");
  need(gating.experts_per_token <= experts / gating.groups * gating.groups_kept, "too few experts in the kept groups");
  need(bias.empty() || int64_t(bias.size()) == experts, "one router bias per expert");
  need(!own_tokens || !lanes_.empty(), "tokens of one's own need an exchange to travel by");
  need(!peers_ || own_tokens, "who has no tokens of one's own has them in common with all");
  for (const auto& lane : lanes_) {
    need(ranks_ && lane->rank() == ranks_->rank() && lane->size() == ranks_->size(), "an exchange among other ranks");
  }
  need(shared.empty() || shared.size() == 2, "the shared expert is a gate_up and a down");
  need(shared.empty() || fit(shared[0], shared[1], size), "an expert's shapes do not fit");
  need(shared_gate.empty() || (!shared.empty() && shared_gate[0].n == 1 && shared_gate[0].k == size),
       "the shared expert's gate has one row of the model's size");
  check(held);
  present_ = std::make_shared<Present>(Present{std::move(held), std::vector<int64_t>(size_t(experts))});
}

void Moe::check(const HeldExperts& held) const {
  const auto& [placement, gate_up, down] = held;
  int64_t slots = ranks_ ? share_begin_of(ranks_->rank() + 1) - share_begin_of(ranks_->rank()) : weights_.router.n;
  need(lanes_.empty() == (placement == nullptr), "a placement is for experts to which tokens travel");
  if (placement) {
    placement->check(ranks_->size());
    need(int64_t(placement->copies.size()) == weights_.router.n, "a placement for another number of experts");
    slots = placement->held[size_t(ranks_->rank())];
  }
  need(slots >= 1, "more ranks than experts");
  need(int64_t(gate_up.size()) == slots && int64_t(down.size()) == slots, "one gate_up and one down per expert");
  for (size_t slot = 0; slot < gate_up.size(); ++slot) {
    need(fit(gate_up[slot], down[slot], size()), "an expert's shapes do not fit");
    need(gate_up[slot].n == gate_up[0].n && gate_up[slot].kind == gate_up[0].kind && down[slot].kind == down[0].kind,
         "all experts have one shape and one kind of weight");
  }
  need(prepared_alike(gate_up) && prepared_alike(down), "all experts have one kind of columns");
}

void Moe::hold(HeldExperts held) {
  check(held);
  present_->held = std::move(held);
}

std::vector<int64_t> Moe::take_counts() {
  std::vector<int64_t> found(size_t(weights_.router.n));
  found.swap(present_->counts);
  return found;
}

Experts Moe::experts() const { return {held().gate_up, held().down, act_}; }

void Moe::run(const void* x, int64_t ldx, void* y, int64_t ldy, const void* residual, int64_t ld_residual, DType type,
              int64_t rows) const {
  const int64_t bytes = bytes_of(type), row_bytes = gating_.experts_per_token * size() * bytes;
  int64_t step = std::max<int64_t>(1, kMaxPlaces / gating_.experts_per_token);
  if (own_tokens_) {
    step = std::min(step, lanes_[0]->most_tokens(size() * bytes, gating_.experts_per_token));
    if (peers_) step = std::min(step, peers_->part_bytes() / (size() * bytes));
    need(step >= 1, "a token's products do not fit into the ranks' memory");
    return run_own({static_cast<const char*>(x), ldx, static_cast<char*>(y), ldy, static_cast<const char*>(residual),
                    ld_residual, type, rows},
                   step);
  }
  if (!lanes_.empty()) {
    const int64_t own = std::min(lanes_[0]->most_tokens(size() * bytes, gating_.experts_per_token),
                                 ranks_->part_bytes() / (size() * bytes));
    step = std::min(step, own * ranks_->size());
  } else if (ranks_) {
    step = std::min(step, ranks_->part_bytes() / row_bytes);
  }
  need(step >= 1, "a token's products do not fit into the ranks' memory");
  for (int64_t row = 0; row < rows; row += step) {
    const Part part{static_cast<const char*>(x) + row * ldx * bytes, ldx, static_cast<char*>(y) + row * ldy * bytes, ldy,
                    residual == nullptr ? nullptr : static_cast<const char*>(residual) + row * ld_residual * bytes,
                    ld_residual, type, std::min(step, rows - row)};
    lanes_.empty() ? run_part(part) : run_exchanged(part);
  }
}

void Moe::route(const Part& part, const Routed& to) const {
  const int64_t experts = weights_.router.n;
  gemm(weights_.router, part.x, part.type, part.ldx, to.logits, DType::f32, experts, part.rows, {});
  const float* bias = weights_.router_bias.empty() ? nullptr : weights_.router_bias.data();
  top_experts({&gating_, to.logits, bias, experts, to.weights, to.chosen}, part.rows);
  std::vector<int64_t>& counts = present_->counts;
  for (int64_t i = 0; i < part.rows * gating_.experts_per_token; ++i) ++counts[size_t(to.chosen[i])];
}

void Moe::run_part(const Part& part) const {
  const int64_t rows = part.rows, per_token = gating_.experts_per_token, places = rows * per_token;
  const int64_t bytes = size() * bytes_of(part.type);
  const Experts experts = this->experts();

  Routed routed{};
  char *sorted = nullptr, *z = nullptr;
  Order order{};
  ExpertsMemory memory{};
  Shared shared{};
  const auto share_out = [&](Pieces pieces) {
    routed = take_routed(pieces, rows);
    order.token = pieces.take<int32_t>(places);
    order.place = pieces.take<int32_t>(places);
    sorted = pieces.take<char>(places * bytes);
    memory = ExpertsMemory::take(pieces, experts, part.type, places);
    z = pieces.take<char>(places * bytes);
    shared = take_shared(pieces, part.type, rows);
    return pieces.used();
  };
  share_out(Pieces(static_cast<char*>(scratch(share_out(Pieces(nullptr)), 2))));

  route(part, routed);
  order.sort(routed.chosen, rows, per_token, weights_.router.n);
  const int64_t first = ranks_ ? share_begin_of(ranks_->rank()) : 0;
  const auto begin = order.begin.begin() + first;
  const std::vector<int64_t> own(begin, begin + int64_t(experts.down.size()) + 1);
  PreparedRows x{part.x, part.type, 0};  // a single row is all there is: every expert reads it where it lies
  if (rows > 1) {
    side_by_side(own.front(), own.back(), bytes, sorted, [&](int64_t place, char* to) {
      std::memcpy(to, part.row(order.token[place]), size_t(bytes));
    });
    x = {sorted, part.type, bytes};
  }
  run_experts(experts, own, x, part.type, memory, z);
  run_shared(part, shared);
  if (ranks_) gather(order.begin, bytes, z);
  for (int64_t i = 0; i < places; ++i) routed.z[i] = z + order.place[i] * bytes;
  combine(part, routed, shared);
}

void Moe::combine(const Part& part, const Routed& routed, const Shared& shared) const {
  const int64_t per_token = gating_.experts_per_token;
  const float* shared_logits = weights_.shared_gate.empty() ? nullptr : shared.logits;
  const Combine call{part.type,     size(),        per_token,        routed.weights, routed.z, shared.out,
                     shared_logits, part.residual, part.ld_residual, part.y,         part.ldy};
  in_steps(part.rows, std::max<int64_t>(1, (64 << 10) / (size() * (per_token + 1))),
           [&](int64_t first, int64_t last) { moe_ops().combine(call, first, last); });
}

Moe::Routed Moe::take_routed(Pieces& pieces, int64_t rows) const {
  const int64_t places = rows * gating_.experts_per_token;
  Routed routed{};
  routed.logits = pieces.take<float>(rows * weights_.router.n);
  routed.weights = pieces.take<float>(places);
  routed.chosen = pieces.take<int32_t>(places);
  routed.z = pieces.take<const void*>(places);
  return routed;
}

Moe::Shared Moe::take_shared(Pieces& pieces, DType type, int64_t rows) const {
  Shared shared{};
  if (weights_.shared.empty()) return shared;
  shared.inner = pieces.take<char>(rows * weights_.shared[1].k * bytes_of(type));
  shared.out = pieces.take<char>(rows * size() * bytes_of(type));
  shared.logits = pieces.take<float>(rows);
  return shared;
}

int64_t Moe::share_begin_of(int rank) const { return share_begin(weights_.router.n, rank, ranks_->size()); }

/// The rows of z [places] that the other ranks have computed. begin: [E + 1] places.
void Moe::gather(const std::vector<int64_t>& begin, int64_t row_bytes, char* z) const {
  const auto rows_of = [&](int rank) {
    const int64_t first = begin[size_t(share_begin_of(rank))], last = begin[size_t(share_begin_of(rank + 1))];
    return std::pair<char*, size_t>{z + first * row_bytes, size_t((last - first) * row_bytes)};
  };
  const auto [own, own_bytes] = rows_of(ranks_->rank());
  std::memcpy(ranks_->mine(), own, own_bytes);
  size_t most = 0;
  for (int rank = 0; rank < ranks_->size(); ++rank) most = std::max(most, rows_of(rank).second);
  ranks_->exchange(int64_t(most));
  for (int rank = 0; rank < ranks_->size(); ++rank) {
    const auto [theirs, bytes] = rows_of(rank);
    if (rank != ranks_->rank()) std::memcpy(theirs, ranks_->part(rank), bytes);
  }
}

void Moe::run_shared(const Part& part, const Shared& to) const {
  if (weights_.shared.empty()) return;
  const PackedWeight &gate_up = weights_.shared[0], &down = weights_.shared[1];
  Epilogue gate;
  gate.act = act_;
  gemm(gate_up, part.x, part.type, part.ldx, to.inner, part.type, down.k, part.rows, gate);
  gemm(down, to.inner, part.type, down.k, to.out, part.type, down.n, part.rows, {});
  if (!weights_.shared_gate.empty()) {
    gemm(weights_.shared_gate[0], part.x, part.type, part.ldx, to.logits, DType::f32, 1, part.rows, {});
  }
}

void top_experts(const GatingRows& op, int64_t rows) {
  in_steps(rows, 32, [&](int64_t first, int64_t last) { moe_ops().top_experts(op, first, last); });
}

}  // namespace ml
