// The products of many experts with their own rows, in one go.
//
// A place is a (token, expert) pair; places are sorted by expert: those of expert e are [begin[e], begin[e + 1]), and
// begin[0] need not be 0. Each product has the bits of ops/gemm.h, so nothing depends on which tokens share an expert.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/pieces.h"
#include "base/pool.h"
#include "ops/gemm.h"

namespace ml {

/// body(first, last) over `rows` in tasks of `step` rows.
template <class Body>
void in_steps(int64_t rows, int64_t step, Body body) {
  if (rows <= step) return body(int64_t{0}, rows);
  parallel(ceil_div(rows, step), [&](int64_t task) { body(task * step, std::min(rows, (task + 1) * step)); });
}

/// copy(i, to) for each place in [begin, end), with `to` that place of `out`, which has `bytes` for each.
template <class Copy>
void side_by_side(int64_t begin, int64_t end, int64_t bytes, char* out, Copy copy) {
  in_steps(end - begin, std::max<int64_t>(1, (256 << 10) / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = begin + first; i < begin + last; ++i) copy(i, out + i * bytes);
  });
}

/// The gated feed-forward networks of some experts.
struct Experts {
  const std::vector<PackedWeight>& gate_up;  // [2F, M], gated
  const std::vector<PackedWeight>& down;     // [M, F]
  Activation act;

  int64_t size() const { return down[0].n; }
  int64_t inner() const { return down[0].k; }
};

/// What products need besides their inputs and outputs.
struct ExpertsMemory {
  char* x_ready;
  char* h;
  char* h_ready;

  static ExpertsMemory take(Pieces& pieces, const Experts& experts, DType type, int64_t places);
};

/// z [places, M] = what the experts make of x [places, M]; type: of z.
void run_experts(const Experts& experts, const std::vector<int64_t>& begin, PreparedRows x, DType type,
                 const ExpertsMemory& memory, char* z);

/// Whether rows are prepared for all these weights in the same number of bytes, as `run_experts` needs it.
bool prepared_alike(const std::vector<PackedWeight>& weights);

}  // namespace ml
