// The ranks that compute one model together: each is a process (or a thread) with its shard of the weights.
//
// There is one thing to do, `exchange`: every rank writes its part, and then reads the parts of all. Sums, gathers and
// broadcasts are what the readers make of the parts. All ranks call it equally often and in the same order.
//
// Parts are double-buffered: a part stays readable until the next exchange but one is prepared.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ml {

/// A rank has ended, or has not answered in time. What it holds of the model is gone: fatal for the others.
struct RankLost : std::runtime_error {
  RankLost(int rank, const std::string& what) : std::runtime_error(what), rank(rank) {}
  int rank;
};

constexpr int kMostRanks = 64;

/// Where the share of a rank begins when `total` things are split among `size` ranks.
constexpr int64_t share_begin(int64_t total, int rank, int size) { return total * rank / size; }

class Ranks {
 public:
  /// part_bytes: the most that one exchange can carry from each rank; rounded up to whole pages. Throws
  /// std::invalid_argument.
  Ranks(int rank, int size, int64_t part_bytes);
  virtual ~Ranks() = default;
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t part_bytes() const { return part_bytes_; }

  /// Where this rank's part of the next exchange goes; 64-byte aligned.
  void* mine() const { return part_of(rank_, done_ + 1); }

  /// Gives the first `bytes` of `mine` to all others, and waits for as much of theirs. Throws RankLost.
  void exchange(int64_t bytes);

  /// A rank's part of the last exchange.
  const void* part(int rank) const { return part_of(rank, done_); }

 protected:
  /// Memory for all parts of exchanges `round` and the next: two parts for each rank.
  void place(char* parts) { parts_ = parts; }
  int64_t parts_bytes() const { return int64_t{size_} * 2 * part_bytes_; }
  char* part_of(int rank, uint32_t round) const { return parts_ + (int64_t{rank} * 2 + round % 2) * part_bytes_; }

  /// Exchange number `round`.
  virtual void carry(uint32_t round, int64_t bytes) = 0;

  const int rank_, size_;
  const int64_t part_bytes_;

 private:
  char* parts_ = nullptr;
  uint32_t done_ = 0;  // exchanges
};

}  // namespace ml
