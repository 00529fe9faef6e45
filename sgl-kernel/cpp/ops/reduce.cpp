#include "ops/reduce.h"

#include <algorithm>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

constexpr int64_t kTaskElements = 16 * 1024;  // some 10 microseconds

}  // namespace

void reduced_gemm(Ranks& ranks, const PackedWeight& w, const void* x, int64_t ldx, void* out, int64_t ld, DType type,
                  int64_t rows, const Epilogue& epilogue) {
  const int64_t columns = w.columns(), item = bytes_of(type);
  const int64_t most = ranks.part_bytes() / (columns * int64_t(sizeof(float)));
  if (most < 1 || ranks.size() > kMostParts) throw std::invalid_argument("too wide a sum, or too many ranks");
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = std::min(most, rows - row);
    gemm(w, static_cast<const char*>(x) + row * ldx * item, type, ldx, ranks.mine(), DType::f32, columns, count, {});
    ranks.exchange(count * columns * int64_t(sizeof(float)));
    const int64_t per_task = std::max<int64_t>(1, kTaskElements / columns);
    const auto finish_rows = [&](int64_t task) {
      for (int64_t i = task * per_task; i < std::min(count, (task + 1) * per_task); ++i) {
        Parts parts{};
        parts.count = ranks.size();
        for (int r = 0; r < parts.count; ++r) parts.part[r] = static_cast<const float*>(ranks.part(r)) + i * columns;
        const Epilogue at = epilogue.from_row(row + i, type);
        reduce_ops().finish(parts, columns, at.bias, at.residual, type,
                            static_cast<char*>(out) + (row + i) * ld * item);
      }
    };
    const int64_t tasks = ceil_div(count, per_task);
    if (tasks == 1) {
      finish_rows(0);
    } else {
      parallel(tasks, finish_rows);
    }
  }
}

}  // namespace ml
