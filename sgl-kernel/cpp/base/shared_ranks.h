// The ranks of one host: parts lie in memory that all have mapped.
//
// One round of notices per exchange is enough: a rank may overwrite a part two exchanges later, and to have got there it
// has seen everyone begin the exchange in between, and so done with the part.
#pragma once

#include <cstdint>
#include <string>

#include "base/ranks.h"
#include "base/roll.h"

namespace ml {

class SharedRanks : public Ranks {
 public:
  /// path, patience_ms, spin_us: see Roll. Throws std::invalid_argument too.
  SharedRanks(const std::string& path, int rank, int size, int64_t part_bytes, int64_t patience_ms, int64_t spin_us);

 private:
  void carry(uint32_t round, int64_t bytes) override;

  Roll roll_;
};

}  // namespace ml
