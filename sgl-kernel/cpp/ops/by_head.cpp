#include "ops/by_head.h"

#include <algorithm>
#include <cstring>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

constexpr int64_t kTaskRows = 96;  // of one head: with its weight in L2 these are some 20 us; see gemm.cpp

}  // namespace

void gemm_by_head(const std::vector<PackedWeight>& weights, const HeadProducts& op, int64_t tokens) {
  const PackedWeight& first = weights[0];
  const int64_t bytes = bytes_of(op.type), heads = int64_t(weights.size()), blocks = ceil_div(tokens, kTaskRows);
  const int64_t prepared = tile_ops(first).prepared_bytes(first, op.type);
  parallel(heads * blocks, [&](int64_t task) {
    const int64_t head = task / blocks, token = task % blocks * kTaskRows;
    const int64_t rows = std::min(kTaskRows, tokens - token);
    const PackedWeight& w = weights[size_t(head)];
    const char* const x = static_cast<const char*>(op.x) + (token * op.ldx + head * (w.k + op.tail)) * bytes;
    char* const y = static_cast<char*>(op.y) + (token * op.ldy + head * (w.n + op.tail)) * bytes;
    const PreparedRows ready = prepare_rows(w, x, op.type, op.ldx, rows, scratch(rows * prepared, 1));
    gemm_panels(w, 0, w.panels, ready, rows, {y, op.type, op.ldy}, {});
    for (int64_t i = 0; i < rows && op.tail > 0; ++i) {
      std::memcpy(y + (i * op.ldy + w.n) * bytes, x + (i * op.ldx + w.k) * bytes, size_t(op.tail * bytes));
    }
  });
}

}  // namespace ml
