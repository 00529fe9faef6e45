#include "ops/gemm.h"

#include <algorithm>
#include <cstring>

#include "base/pool.h"
#include "base/span.h"
#include "ops/quant.h"

namespace ml {
namespace {

// Rows that one task takes: as many as fit in half of an L2 of 1 MB beside the panel. 12 divides it, the height of the
// register tile.
constexpr int64_t kRowsBytes = 384 << 10;
constexpr int64_t kRowsStep = 12;

// The work of a task, about 20 us: bytes of weights when memory is the limit, multiply-adds when arithmetic is.
constexpr int64_t kTaskBytes = 512 << 10;
constexpr int64_t kTaskProducts = int64_t{3} << 20;

int64_t rows_per_task(int64_t m, int64_t row_bytes) {
  const int64_t fit = std::max(kRowsStep, kRowsBytes / std::max<int64_t>(row_bytes, 1) / kRowsStep * kRowsStep);
  const int64_t most = std::min(fit, kTileRows);
  if (m <= most) return m;
  const int64_t blocks = ceil_div(m, most);
  return std::min(most, round_up(ceil_div(m, blocks), kRowsStep));
}

/// Cuts the panels into tasks: of the wanted size at first, single panels at the end, so that the threads finish
/// together.
class PanelCut {
 public:
  PanelCut(int64_t panels, int64_t wanted, int threads) : panels_(panels), size_(std::max<int64_t>(wanted, 1)) {
    const int64_t fine = std::min(panels, threads > 1 ? int64_t{2} * threads * size_ : 0);
    coarse_ = (panels - fine) / size_;
    half_ = std::max<int64_t>(size_ / 4, 1);
    fine_ = ceil_div(panels - coarse_ * size_, half_);
  }

  int64_t tasks() const { return coarse_ + fine_; }

  int64_t begin(int64_t task) const {
    const int64_t at = task <= coarse_ ? task * size_ : coarse_ * size_ + (task - coarse_) * half_;
    return std::min(at, panels_);
  }

 private:
  int64_t panels_, size_, coarse_, half_, fine_;
};

// Rows this far apart, or a multiple of it, meet in the same eight lines of L1: a register tile of twelve loses each
// line before it is read to its end. Such rows are copied a line further apart, unless they are few.
constexpr int64_t kConflict = 4096, kLine = 64;
constexpr int64_t kFewRows = 6;

bool in_conflict(const PreparedRows& x, int64_t m) { return m > kFewRows && x.ld_bytes % kConflict == 0; }

PreparedRows spread_rows(PreparedRows x, int64_t m, int64_t bytes, char* out) {
  const PreparedRows done{out, x.type, round_up(bytes, kLine) + kLine};
  const int64_t step = std::max<int64_t>((256 << 10) / bytes, 1);
  parallel(ceil_div(m, step), [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(m, (task + 1) * step); ++row) {
      std::memcpy(out + row * done.ld_bytes, x.from_row(row).data, size_t(bytes));
    }
  });
  return done;
}

PreparedRows prepare_parallel(const PackedWeight& w, PreparedRows x, int64_t m, char* out, int64_t bytes) {
  const TileOps& ops = tile_ops(w);
  const int64_t step = std::max<int64_t>((256 << 10) / bytes, 1);
  if (m <= step) return ops.prepare(w, x, m, out);
  PreparedRows first{};
  parallel(ceil_div(m, step), [&](int64_t task) {
    const int64_t row = task * step;
    const PreparedRows done = ops.prepare(w, x.from_row(row), std::min(step, m - row), out + row * bytes);
    if (task == 0) first = done;
  });
  return first;
}

}  // namespace

const TileOps& tile_ops(const PackedWeight& w) {
  switch (w.kind) {
    case WeightKind::f32:
      return gemm_ops().f32;
    case WeightKind::bf16:
      return gemm_ops().bf16;
    default:
      return quant_tile_ops(w);
  }
}

PreparedRows prepare_rows(const PackedWeight& w, const void* x, DType x_type, int64_t ldx, int64_t m, void* out) {
  const PreparedRows rows{x, x_type, ldx * bytes_of(x_type)};
  const TileOps& ops = tile_ops(w);
  return ops.prepared_bytes(w, x_type) == 0 ? rows : ops.prepare(w, rows, m, out);
}

void gemm_panels(const PackedWeight& w, int64_t begin, int64_t end, PreparedRows x, int64_t rows, const Output& y,
                 const Epilogue& epilogue) {
  const TileOps& ops = tile_ops(w);
  const auto finish = gemm_ops().finish;
  float* const tile = static_cast<float*>(scratch(kTileRows * kPanel * int64_t(sizeof(float))));
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = std::min(kTileRows, rows - row);
    const Epilogue part = epilogue.from_row(row, y.type);
    for (int64_t panel = begin; panel < end; ++panel) {
      ops.tile(w, panel, x.from_row(row), count, tile);
      finish(w, panel, tile, count, y.from_row(row), part);
    }
  }
}

void gemm(const PackedWeight& w, const void* x, DType x_type, int64_t ldx, void* y, DType y_type, int64_t ldy,
          int64_t m, const Epilogue& epilogue) {
  if (m <= 0) return;
  PreparedRows rows{x, x_type, ldx * bytes_of(x_type)};
  const int64_t prepared = tile_ops(w).prepared_bytes(w, x_type);
  if (prepared > 0) {
    rows = prepare_parallel(w, rows, m, static_cast<char*>(scratch(m * prepared, 3)), prepared);
  } else if (in_conflict(rows, m)) {
    const int64_t bytes = w.k * bytes_of(x_type);
    rows = spread_rows(rows, m, bytes, static_cast<char*>(scratch(m * (bytes + 2 * kLine), 3)));
  }

  const Output out{y, y_type, ldy};
  const int64_t height = rows_per_task(m, rows.ld_bytes);
  const int64_t blocks = ceil_div(m, height);
  const int64_t by_bytes = kTaskBytes / std::max<int64_t>(w.panel_bytes, 1);
  const int64_t by_products = kTaskProducts / std::max<int64_t>(height * w.k * kPanel, 1);
  const PanelCut cut(w.panels, std::min(by_bytes, by_products), blocks == 1 ? threads() : 1);
  parallel(blocks * cut.tasks(), [&](int64_t task) {
    const int64_t row = task / cut.tasks() * height, part = task % cut.tasks();
    gemm_panels(w, cut.begin(part), cut.begin(part + 1), rows.from_row(row), std::min(height, m - row),
                out.from_row(row), epilogue.from_row(row, y_type));
  });
}

}  // namespace ml
