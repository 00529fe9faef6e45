// The ranks of one host: parts lie in memory that all have mapped.
//
// One round of notices per exchange is enough: a rank may overwrite a part two exchanges later, and to have got there it
// has seen everyone begin the exchange in between, and so done with the part.
#pragma once

#include <cstdint>
#include <string>

#include "base/ranks.h"

namespace ml {

class SharedRanks : public Ranks {
 public:
  /// path: a file that all ranks name and nobody else; who comes first makes it. Returns at once. patience_ms: how long
  /// an exchange waits for a rank that lives; one whose process has ended is noticed within 100 ms. spin_us: how long it
  /// looks before it sleeps (0 where ranks share cores). Throws std::invalid_argument, and std::runtime_error with the
  /// system's reason.
  SharedRanks(const std::string& path, int rank, int size, int64_t part_bytes, int64_t patience_ms, int64_t spin_us);
  ~SharedRanks() override;

 private:
  struct Notice;
  void carry(uint32_t round, int64_t bytes) override;
  Notice& notice(int rank) const;
  void await(int rank, uint32_t round) const;
  bool lives(int rank) const;

  int file_ = -1;
  int64_t patience_ms_, spin_us_;
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

}  // namespace ml
