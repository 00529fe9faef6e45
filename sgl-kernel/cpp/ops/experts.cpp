#include "ops/experts.h"

namespace ml {
namespace {

// Rows and work of one task, some 20 us; see gemm.cpp.
constexpr int64_t kTaskRows = 96;
constexpr int64_t kTaskBytes = 512 << 10;
constexpr int64_t kTaskProducts = int64_t{3} << 20;

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

}  // namespace

ExpertsMemory ExpertsMemory::take(Pieces& pieces, const Experts& experts, DType type, int64_t places) {
  ExpertsMemory memory{};
  memory.x_ready = pieces.take<char>(prepared_size(experts.gate_up, type, places));
  memory.h = pieces.take<char>(places * experts.inner() * bytes_of(type));
  memory.h_ready = pieces.take<char>(prepared_size(experts.down, type, places));
  return memory;
}

void run_experts(const Experts& experts, const std::vector<int64_t>& begin, PreparedRows x, DType type,
                 const ExpertsMemory& memory, char* z) {
  const int64_t inner = experts.inner();
  Epilogue gate;
  gate.act = experts.act;
  products(experts.gate_up, begin, prepared(experts.gate_up, begin, x, memory.x_ready), {memory.h, type, inner}, gate);
  const PreparedRows h = prepared(experts.down, begin, {memory.h, type, inner * bytes_of(type)}, memory.h_ready);
  products(experts.down, begin, h, {z, type, experts.size()}, {});
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

}  // namespace ml
