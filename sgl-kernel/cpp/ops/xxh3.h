// XXH3-64, the checksum of pages outside the device pool, taken while they are copied.
#pragma once

#include <cstdint>

#include "ops/table.h"

namespace ml {

/// Part of what is summed: `bytes` at `from`, a multiple of kXxh3Stripe. With `to` not null they are copied there in the
/// same pass: what is summed is what is written.
struct SummedPart {
  const char* from;
  char* to;
  int64_t bytes;
};

constexpr int64_t kXxh3Stripe = 64;
constexpr int64_t kXxh3Least = 241;  // bytes: shorter inputs are summed in another way, which is not here

struct Xxh3Table {
  /// XXH3-64 (seed 0, default secret) of the parts one after the other, at least kXxh3Least bytes. In this thread.
  uint64_t (*sum)(const SummedPart* parts, int64_t count);
};

}  // namespace ml

ML_DECLARE_TABLE(Xxh3Table, xxh3)
