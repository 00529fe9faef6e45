#include "base/shared_ranks.h"

namespace ml {

SharedRanks::SharedRanks(const std::string& path, int rank, int size, int64_t part_bytes, int64_t patience_ms,
                         int64_t spin_us)
    : Ranks(rank, size, part_bytes), roll_(path, rank, parts_bytes(), patience_ms, spin_us) {
  place(roll_.payload());
}

void SharedRanks::carry(uint32_t round, int64_t) {
  roll_.announce(round);
  for (int other = 0; other < size_; ++other) {
    if (other != rank_) roll_.await(other, round);
  }
}

}  // namespace ml
