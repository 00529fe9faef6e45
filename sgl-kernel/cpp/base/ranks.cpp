#include "base/ranks.h"

#include "base/span.h"

namespace ml {

namespace {

int checked_rank(int rank, int size, int64_t part_bytes) {
  if (size < 1 || size > kMostRanks || rank < 0 || rank >= size || part_bytes < 1) {
    throw std::invalid_argument("rank, size or part_bytes is out of range");
  }
  return rank;
}

}  // namespace

Ranks::Ranks(int rank, int size, int64_t part_bytes)
    : rank_(checked_rank(rank, size, part_bytes)), size_(size), part_bytes_(round_up(part_bytes, 4096)) {}

void Ranks::exchange(int64_t bytes) {
  if (bytes < 0 || bytes > part_bytes_) throw std::invalid_argument("more than a part holds");
  carry(done_ + 1, bytes);
  ++done_;
}

}  // namespace ml
