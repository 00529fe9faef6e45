#include "ops/moe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

// Tokens times experts per token that are computed at a time: bounds the scratch memory at some 10 KB each. Enough for
// long products, since only the tokens of one expert meet in one.
constexpr int64_t kMaxPlaces = 16384;

// Rows and work of one task, some 20 us; see gemm.cpp.
constexpr int64_t kTaskRows = 96;
constexpr int64_t kTaskBytes = 512 << 10;
constexpr int64_t kTaskProducts = int64_t{3} << 20;

void need(bool right, const char* what) {
  if (!right) throw std::invalid_argument(std::string("mixture of experts: ") + what);
}

/// body(first, last) over `rows` in tasks of `step` rows.
template <class Body>
void in_steps(int64_t rows, int64_t step, Body body) {
  if (rows <= step) return body(int64_t{0}, rows);
  parallel(ceil_div(rows, step), [&](int64_t task) { body(task * step, std::min(rows, (task + 1) * step)); });
}

/// Hands out pieces of one allocation, each aligned to 64 bytes. The first pass, without memory, only counts.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    char* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

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

struct Task {
  int64_t expert, first, rows;  // places
  int64_t panel, last_panel;
};

/// Every expert's product with its places, cut into tasks.
std::vector<Task> cut(const std::vector<PackedWeight>& weights, const std::vector<int64_t>& begin) {
  std::vector<Task> tasks;
  for (size_t e = 0; e < weights.size(); ++e) {
    const PackedWeight& w = weights[e];
    for (int64_t first = begin[e]; first < begin[e + 1]; first += kTaskRows) {
      const int64_t rows = std::min(kTaskRows, begin[e + 1] - first);
      const int64_t by_bytes = kTaskBytes / std::max<int64_t>(w.panel_bytes, 1);
      const int64_t by_products = kTaskProducts / std::max<int64_t>(rows * w.k * kPanel, 1);
      const int64_t step = std::max<int64_t>(1, std::min(by_bytes, by_products));
      for (int64_t panel = 0; panel < w.panels; panel += step) {
        tasks.push_back({int64_t(e), first, rows, panel, std::min(w.panels, panel + step)});
      }
    }
  }
  return tasks;
}

/// Every expert's product with its places; places are rows of x and y.
void products(const std::vector<PackedWeight>& weights, const std::vector<int64_t>& begin, PreparedRows x,
              const Output& y, const Epilogue& epilogue) {
  const std::vector<Task> tasks = cut(weights, begin);
  parallel(int64_t(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[size_t(i)];
    gemm_panels(weights[size_t(t.expert)], t.panel, t.last_panel, x.from_row(t.first), t.rows, y.from_row(t.first),
                epilogue);
  });
}

/// The rows of x of places [begin, end), `bytes` long, at those places of `out`.
PreparedRows side_by_side(PreparedRows x, const Order& order, int64_t begin, int64_t end, int64_t bytes, char* out) {
  in_steps(end - begin, std::max<int64_t>(1, (256 << 10) / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = begin + first; i < begin + last; ++i) {
      std::memcpy(out + i * bytes, x.from_row(order.token[i]).data, size_t(bytes));
    }
  });
  return {out, x.type, bytes};
}

/// Every expert's places ready for its weight's kernels; `out` is used when they have to be converted. Each expert
/// prepares its own: a quantised weight may have an order of columns of its own.
PreparedRows prepared(const std::vector<PackedWeight>& weights, const std::vector<int64_t>& begin, PreparedRows x,
                      char* out) {
  const int64_t bytes = tile_ops(weights[0]).prepared_bytes(weights[0], x.type);
  if (bytes == 0) return x;
  std::vector<Task> tasks;
  for (size_t e = 0; e < weights.size(); ++e) {
    for (int64_t first = begin[e]; first < begin[e + 1]; first += kTaskRows) {
      tasks.push_back({int64_t(e), first, std::min(kTaskRows, begin[e + 1] - first), 0, 0});
    }
  }
  PreparedRows result{};
  parallel(int64_t(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[size_t(i)];
    const PackedWeight& w = weights[size_t(t.expert)];
    const PreparedRows done = tile_ops(w).prepare(w, x.from_row(t.first), t.rows, out + t.first * bytes);
    if (i == 0) result = done;
  });
  return result;
}

/// Bytes of `places` prepared rows.
int64_t prepared_size(const std::vector<PackedWeight>& weights, DType type, int64_t places) {
  return places * tile_ops(weights[0]).prepared_bytes(weights[0], type);
}

bool prepared_alike(const std::vector<PackedWeight>& weights) {
  for (const PackedWeight& w : weights) {
    for (DType type : {DType::f32, DType::bf16, DType::f16}) {
      const PackedWeight& first = weights[0];
      if (tile_ops(w).prepared_bytes(w, type) != tile_ops(first).prepared_bytes(first, type)) return false;
    }
  }
  return true;
}

}  // namespace

/// Some of the rows of a run, few enough for the scratch memory.
struct Moe::Part {
  const char* x;
  int64_t ldx;
  char* y;
  int64_t ldy;
  const char* residual;
  int64_t ld_residual;
  DType type;
  int64_t rows;
};

/// Where the expert that every token visits leaves its results.
struct Moe::Shared {
  char* inner;    // [rows, F]
  char* out;      // [rows, M]
  float* logits;  // [rows], of its gate
};

Moe::Moe(MoeWeights weights, const Gating& gating, Activation act, std::shared_ptr<Ranks> ranks)
    : weights_(std::move(weights)), gating_(gating), act_(act), ranks_(std::move(ranks)) {
  const auto& [router, bias, gate_up, down, shared, shared_gate] = weights_;
  const int64_t experts = router.n, size = router.k;
  need(experts >= 1 && experts <= kMaxExperts, "between 1 and 1024 experts");
  need(gating.experts_per_token >= 1 && gating.experts_per_token <= experts, "experts_per_token is out of range");
  need(gating.groups >= 1 && experts % gating.groups == 0, "the groups must divide the experts");
  need(gating.groups_kept >= 1 && gating.groups_kept <= gating.groups, "groups_kept is out of range");
  need(gating.experts_per_token <= experts / gating.groups * gating.groups_kept, "too few experts in the kept groups");
  need(bias.empty() || int64_t(bias.size()) == experts, "one router bias per expert");
  const int64_t held = ranks_ ? share_begin_of(ranks_->rank() + 1) - share_begin_of(ranks_->rank()) : experts;
  need(held >= 1, "more ranks than experts");
  need(int64_t(gate_up.size()) == held && int64_t(down.size()) == held, "one gate_up and one down per expert");
  need(shared.empty() || shared.size() == 2, "the shared expert is a gate_up and a down");
  need(shared_gate.empty() || (!shared.empty() && shared_gate[0].n == 1 && shared_gate[0].k == size),
       "the shared expert's gate has one row of the model's size");
  std::vector<std::pair<const PackedWeight*, const PackedWeight*>> pairs;
  for (int64_t e = 0; e < held; ++e) pairs.emplace_back(&gate_up[size_t(e)], &down[size_t(e)]);
  if (!shared.empty()) pairs.emplace_back(&shared[0], &shared[1]);
  for (const auto& [up, out] : pairs) {
    need(up->gated && up->k == size && out->n == size && out->k == up->columns(), "an expert's shapes do not fit");
  }
  for (int64_t e = 1; e < held; ++e) {
    need(gate_up[size_t(e)].n == gate_up[0].n && gate_up[size_t(e)].kind == gate_up[0].kind &&
             down[size_t(e)].kind == down[0].kind,
         "all experts have one shape and one kind of weight");
  }
  need(prepared_alike(gate_up) && prepared_alike(down), "all experts have one kind of columns");
}

void Moe::run(const void* x, int64_t ldx, void* y, int64_t ldy, const void* residual, int64_t ld_residual, DType type,
              int64_t rows) const {
  const int64_t bytes = bytes_of(type), row_bytes = gating_.experts_per_token * size() * bytes;
  int64_t step = std::max<int64_t>(1, kMaxPlaces / gating_.experts_per_token);
  if (ranks_) step = std::min(step, ranks_->part_bytes() / row_bytes);
  need(step >= 1, "a token's products do not fit into the ranks' memory");
  for (int64_t row = 0; row < rows; row += step) {
    run_part({static_cast<const char*>(x) + row * ldx * bytes, ldx, static_cast<char*>(y) + row * ldy * bytes, ldy,
              residual == nullptr ? nullptr : static_cast<const char*>(residual) + row * ld_residual * bytes,
              ld_residual, type, std::min(step, rows - row)});
  }
}

void Moe::route(const Part& part, float* logits, float* weights, int32_t* chosen) const {
  const int64_t experts = weights_.router.n;
  gemm(weights_.router, part.x, part.type, part.ldx, logits, DType::f32, experts, part.rows, {});
  const float* bias = weights_.router_bias.empty() ? nullptr : weights_.router_bias.data();
  top_experts({&gating_, logits, bias, experts, weights, chosen}, part.rows);
}

void Moe::run_part(const Part& part) const {
  const int64_t rows = part.rows, per_token = gating_.experts_per_token, places = rows * per_token;
  const int64_t size = weights_.router.k, inner = weights_.down[0].k, bytes = bytes_of(part.type);
  const auto& gate_up = weights_.gate_up;
  const auto& down = weights_.down;

  float *logits = nullptr, *weights = nullptr;
  int32_t* chosen = nullptr;
  char *sorted = nullptr, *x_ready = nullptr, *h = nullptr, *h_ready = nullptr, *z = nullptr;
  Order order{};
  Shared shared{};
  const auto share_out = [&](Pieces pieces) {
    logits = pieces.take<float>(rows * weights_.router.n);
    weights = pieces.take<float>(places);
    chosen = pieces.take<int32_t>(places);
    order.token = pieces.take<int32_t>(places);
    order.place = pieces.take<int32_t>(places);
    sorted = pieces.take<char>(places * size * bytes);
    x_ready = pieces.take<char>(prepared_size(gate_up, part.type, places));
    h = pieces.take<char>(places * inner * bytes);
    h_ready = pieces.take<char>(prepared_size(down, part.type, places));
    z = pieces.take<char>(places * size * bytes);
    if (!weights_.shared.empty()) {
      shared.inner = pieces.take<char>(rows * weights_.shared[1].k * bytes);
      shared.out = pieces.take<char>(rows * size * bytes);
      shared.logits = pieces.take<float>(rows);
    }
    return pieces.used();
  };
  share_out(Pieces(static_cast<char*>(scratch(share_out(Pieces(nullptr)), 2))));

  route(part, logits, weights, chosen);
  order.sort(chosen, rows, per_token, weights_.router.n);
  const PreparedRows given{part.x, part.type, part.ldx * bytes};
  // A single row is all there is: every expert reads it where it lies.
  const int64_t first = ranks_ ? share_begin_of(ranks_->rank()) : 0;
  const std::vector<int64_t> own(order.begin.begin() + first, order.begin.begin() + first + int64_t(down.size()) + 1);
  const PreparedRows x = rows == 1
                             ? PreparedRows{part.x, part.type, 0}
                             : side_by_side(given, order, own.front(), own.back(), size * bytes, sorted);
  Epilogue gate;
  gate.act = act_;
  products(gate_up, own, prepared(gate_up, own, x, x_ready), {h, part.type, inner}, gate);
  const PreparedRows h_rows = prepared(down, own, {h, part.type, inner * bytes}, h_ready);
  products(down, own, h_rows, {z, part.type, size}, {});
  run_shared(part, shared);
  if (ranks_) gather(order.begin, size * bytes, z);

  const float* shared_logits = weights_.shared_gate.empty() ? nullptr : shared.logits;
  const Combine combine{part.type,  size,          per_token,     weights,          order.place, z,
                        shared.out, shared_logits, part.residual, part.ld_residual, part.y,      part.ldy};
  in_steps(rows, std::max<int64_t>(1, (64 << 10) / (size * (per_token + 1))),
           [&](int64_t first, int64_t last) { moe_ops().combine(combine, first, last); });
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
