// The ranks of one host that compute one model together: each is a process (or a thread), and what they tell each other
// goes through memory that all have mapped.
//
// There is one thing to do, `exchange`: every rank writes its part, and then reads the parts of all. Sums, gathers and
// broadcasts are what the readers make of the parts. All ranks call it equally often and in the same order.
//
// Parts are double-buffered, so one round of notices per exchange is enough: a rank may overwrite a part two exchanges
// later, and to have got there it has seen everyone begin the exchange in between, and so done with the part.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ml {

/// A rank has ended, or has not answered in time. What it holds of the model is gone: fatal for the others.
struct RankLost : std::runtime_error {
  RankLost(int rank, const std::string& what) : std::runtime_error(what), rank(rank) {}
  int rank;
};

/// Where the share of a rank begins when `total` things are split among `size` ranks.
constexpr int64_t share_begin(int64_t total, int rank, int size) { return total * rank / size; }

class Ranks {
 public:
  /// path: a file that all ranks name and nobody else; who comes first makes it. Returns at once. part_bytes: the most
  /// that one exchange can carry from each rank. patience_ms: how long an exchange waits for a rank that lives;
  /// spin_us: how long it looks before it sleeps (0 where ranks share cores). Throws std::invalid_argument, and
  /// std::runtime_error with the system's reason.
  Ranks(const std::string& path, int rank, int size, int64_t part_bytes, int64_t patience_ms, int64_t spin_us);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t part_bytes() const { return part_bytes_; }

  /// Where this rank's part of the next exchange goes; 64-byte aligned.
  void* mine() const { return part_of(rank_, done_ + 1); }

  /// Publishes this rank's part and waits for those of the others. Throws RankLost: within 100 ms when a process has
  /// ended, after `patience_ms` when it does not answer.
  void exchange();

  /// A rank's part of the last exchange, valid until the next but one `mine` is written.
  const void* part(int rank) const { return part_of(rank, done_); }

 private:
  struct Notice;
  Notice& notice(int rank) const;
  char* part_of(int rank, uint32_t round) const;
  void await(int rank, uint32_t round) const;
  bool lives(int rank) const;

  int rank_, size_, file_ = -1;
  int64_t part_bytes_, patience_ms_, spin_us_;
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
  uint32_t done_ = 0;  // exchanges
};

}  // namespace ml
