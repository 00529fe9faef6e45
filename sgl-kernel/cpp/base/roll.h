// The ranks of one host as they wait for each other: each announces the rounds it has begun, and all see who still lives.
//
// A file that all map holds one notice per rank, and behind them whatever memory its user wants to share. Each rank holds
// a lock on its byte of that file, which the kernel drops with the process, in whatever state it was.
#pragma once

#include <cstdint>
#include <string>

namespace ml {

class Roll {
 public:
  /// path: a file that all ranks name and nobody else; who comes first makes it. Returns at once. payload_bytes: of the
  /// memory behind the notices, zeros at first. patience_ms: how long a rank that lives is waited for; one whose process
  /// has ended is noticed within 100 ms. spin_us: how long to look before sleeping (0 where ranks share cores). Throws
  /// std::runtime_error with the system's reason.
  Roll(const std::string& path, int rank, int64_t payload_bytes, int64_t patience_ms, int64_t spin_us);
  ~Roll();
  Roll(const Roll&) = delete;
  Roll& operator=(const Roll&) = delete;

  char* payload() const { return memory_ + kHead; }

  /// This rank has begun round `round`: what it wrote before is seen by whoever awaits that.
  void announce(uint32_t round);

  /// Returns when `rank` has begun round `round`. Throws RankLost. Rounds wrap around.
  void await(int rank, uint32_t round) const;

 private:
  struct Notice;
  static constexpr int64_t kHead = 4096;  // of the file: the notices
  Notice& notice(int rank) const;
  bool lives(int rank) const;

  int rank_;
  int file_ = -1;
  int64_t patience_ms_, spin_us_;
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

}  // namespace ml
