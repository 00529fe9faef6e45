#include "ops/rowops.h"

#include <algorithm>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

constexpr int64_t kTaskElements = 64 * 1024;  // some 20 microseconds

/// body(first, last) over all rows, in tasks of whole rows.
template <class Body>
void over_rows(int64_t rows, int64_t dim, Body body) {
  const int64_t per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, dim));
  if (rows <= per_task) return body(int64_t{0}, rows);
  parallel(ceil_div(rows, per_task),
           [&](int64_t task) { body(task * per_task, std::min(rows, (task + 1) * per_task)); });
}

}  // namespace

void rms_norm(const RmsNorm& op, int64_t rows) {
  over_rows(rows, op.dim, [&](int64_t first, int64_t last) { rowops_ops().rms_norm(op, first, last); });
}

void gated(const GatedAct& op, int64_t rows) {
  over_rows(rows, 3 * op.dim, [&](int64_t first, int64_t last) { rowops_ops().gated(op, first, last); });
}

void embedding(const Embedding& op, int64_t rows) {
  over_rows(rows, op.dim, [&](int64_t first, int64_t last) { rowops_ops().embedding(op, first, last); });
}

}  // namespace ml
