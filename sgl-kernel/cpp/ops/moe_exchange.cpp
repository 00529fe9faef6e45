// Moe over an exchange: each rank has its share of the tokens, or tokens of its own, computed where their experts are.
#include <algorithm>
#include <cstring>

#include "base/pieces.h"
#include "ops/moe.h"
#include "ops/moe_part.h"

namespace ml {
namespace {

constexpr int64_t kHalvesFrom = 64;  // tokens of a rank: fewer are one message, not two

}  // namespace

/// Tokens of this rank that travel together.
struct Moe::Half {
  Exchange* exchange;
  Part part;
  Routed routed;
  Shared shared;
};

void Moe::run_exchanged(const Part& part) const {
  const int rank = ranks_->rank(), ranks = ranks_->size();
  const int64_t begin = share_begin(part.rows, rank, ranks), own = share_begin(part.rows, rank + 1, ranks) - begin;
  const int count = part.rows >= kHalvesFrom * ranks ? int(lanes_.size()) : 1;  // on every rank the same
  char* const mine = static_cast<char*>(ranks_->mine());
  std::vector<Half> halves;
  for (int i = 0; i < count; ++i) {
    const int64_t first = share_begin(own, i, count), last = share_begin(own, i + 1, count);
    char* const to = mine + first * size() * bytes_of(part.type);
    halves.push_back(begin_half(*lanes_[size_t(i)], part.some(begin + first, begin + last, to, size())));
  }
  run_halves(std::move(halves));
  gather_rows(*ranks_, part, size());
}

void Moe::run_halves(std::vector<Half>&& halves) const {
  for (const Half& half : halves) serve(half);
  for (const Half& half : halves) finish(half);
}

/// At most `step` tokens of each rank at a time. Ranks that have fewer than others take part without any.
void Moe::run_own(const Part& part, int64_t step) const {
  if (peers_) step *= peers_->size();
  const int64_t rounds = ceil_div(most_rows(part.rows), step);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t begin = std::min(round * step, part.rows), end = std::min(begin + step, part.rows);
    Part some = part.some(begin, end, part.y + begin * part.ldy * bytes_of(part.type), part.ldy);
    run_own_round(some);
    if (peers_ && some.rows > 0) gather_rows(*peers_, some, size());
  }
}

/// Leaves the results where they belong, or, where peers want them too, in this rank's part of their next exchange.
void Moe::run_own_round(const Part& part) const {
  const int rank = peers_ ? peers_->rank() : 0, ranks = peers_ ? peers_->size() : 1;
  const int64_t begin = share_begin(part.rows, rank, ranks), own = share_begin(part.rows, rank + 1, ranks) - begin;
  const int64_t ld = peers_ ? size() : part.ldy;
  char* const to = peers_ ? static_cast<char*>(peers_->mine()) : part.y;
  const int count = int(lanes_.size());
  std::vector<Half> halves;
  for (int i = 0; i < count; ++i) {
    const int64_t first = share_begin(own, i, count), last = share_begin(own, i + 1, count);
    Part some = part.some(begin + first, begin + last, to + first * ld * bytes_of(part.type), ld);
    halves.push_back(begin_half(*lanes_[size_t(i)], some));
  }
  run_halves(std::move(halves));
}

/// The largest number of rows that a rank has.
int64_t Moe::most_rows(int64_t own) const {
  std::memcpy(ranks_->mine(), &own, sizeof own);
  ranks_->exchange(sizeof own);
  int64_t most = own;
  for (int rank = 0; rank < ranks_->size(); ++rank) {
    int64_t rows = 0;
    std::memcpy(&rows, ranks_->part(rank), sizeof rows);
    most = std::max(most, rows);
  }
  return most;
}

/// Chooses experts and sends the tokens to them.
Moe::Half Moe::begin_half(Exchange& exchange, const Part& part) const {
  Half half{&exchange, part, {}, {}};
  const auto share_out = [&](Pieces pieces) {
    half.routed = take_routed(pieces, part.rows);
    half.shared = take_shared(pieces, part.type, part.rows);
    return pieces.used();
  };
  share_out(Pieces(static_cast<char*>(exchange.memory(share_out(Pieces(nullptr)), 0))));
  if (part.rows > 0) route(part, half.routed);
  const int64_t item = bytes_of(part.type);
  exchange.dispatch({part.x, part.type, part.rows, size(), part.ldx * item}, half.routed.chosen,
                    gating_.experts_per_token, held().placement);
  return half;
}

/// Computes the tokens that came for the experts held here, and, while others do, the expert that all visit.
void Moe::serve(const Half& half) const {
  const std::vector<int64_t>& begin = half.exchange->arrived();
  const Experts experts = this->experts();
  const int64_t places = begin.back(), bytes = size() * bytes_of(half.part.type);
  char *sorted = nullptr, *z = nullptr;
  ExpertsMemory memory{};
  const auto share_out = [&](Pieces pieces) {
    sorted = pieces.take<char>(places * bytes);
    memory = ExpertsMemory::take(pieces, experts, half.part.type, places);
    z = pieces.take<char>(places * bytes);
    return pieces.used();
  };
  share_out(Pieces(static_cast<char*>(half.exchange->memory(share_out(Pieces(nullptr)), 1))));
  side_by_side(0, places, bytes, sorted, [&](int64_t place, char* to) { half.exchange->read(place, to); });
  if (places > 0) run_experts(experts, begin, {sorted, half.part.type, bytes}, half.part.type, memory, z);
  half.exchange->give_back(z);
  if (half.part.rows > 0) run_shared(half.part, half.shared);
}

/// Adds up what the experts made of this rank's tokens.
void Moe::finish(const Half& half) const {
  const std::vector<const char*>& rows = half.exchange->returned();
  std::copy(rows.begin(), rows.end(), half.routed.z);
  if (half.part.rows > 0) combine(half.part, half.routed, half.shared);
}

/// The results [rows, size] of all ranks, each of which has its own in its part.
void Moe::gather_rows(Ranks& ranks, const Part& part, int64_t size) {
  const int count = ranks.size();
  const int64_t item = bytes_of(part.type), bytes = size * item;
  ranks.exchange(ceil_div(part.rows, count) * bytes);
  for (int rank = 0; rank < count; ++rank) {
    const int64_t begin = share_begin(part.rows, rank, count), end = share_begin(part.rows, rank + 1, count);
    const char* const from = static_cast<const char*>(ranks.part(rank));
    in_steps(end - begin, std::max<int64_t>(1, (256 << 10) / bytes), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        std::memcpy(part.y + (begin + i) * part.ldy * item, from + i * bytes, size_t(bytes));
      }
    });
  }
}

}  // namespace ml
