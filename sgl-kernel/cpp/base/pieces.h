// Parts of one allocation.
#pragma once

#include <cstdint>

#include "base/span.h"

namespace ml {

/// Hands out pieces of one allocation, each aligned to 64 bytes. The first pass, without memory, only counts.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    char* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace ml
