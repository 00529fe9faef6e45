// A 64-bit checksum of memory at memory speed. It guards against damage, not against an adversary.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/types.h"

namespace ml {

namespace checksum_detail {

constexpr uint64_t kMix = 0x9e3779b97f4a7c15ull;     // 2^64 / golden ratio, odd
constexpr uint64_t kSpread = 0xd6e8feb86659fd93ull;  // odd, bits well mixed

ML_INLINE uint64_t avalanche(uint64_t h) {
  h = (h ^ (h >> 32)) * kSpread;
  h = (h ^ (h >> 29)) * kMix;
  return h ^ (h >> 32);
}

/// Of one block. Four independent lanes of multiply-and-rotate, 32 bytes per step.
ML_INLINE uint64_t of_block(const char* from, int64_t n, uint64_t seed, char* to) {
  uint64_t lane[4] = {seed ^ kMix, seed + kSpread, seed ^ ~kMix, seed - kSpread};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint64_t word[4];
    std::memcpy(word, from + i, 32);
    if (to != nullptr) std::memcpy(to + i, word, 32);
    for (int k = 0; k < 4; ++k) {
      lane[k] = (lane[k] ^ word[k]) * kMix;
      lane[k] = (lane[k] << 29) | (lane[k] >> 35);
    }
  }
  uint64_t rest[4] = {0, 0, 0, 0};
  if (i < n) std::memcpy(rest, from + i, size_t(n - i));
  if (i < n && to != nullptr) std::memcpy(to + i, from + i, size_t(n - i));
  uint64_t h = uint64_t(n) * kSpread;
  for (int k = 0; k < 4; ++k) h = avalanche(h ^ avalanche(lane[k] ^ (rest[k] * kMix))) + uint64_t(k);
  return h;
}

constexpr int64_t kBlock = 8192;

}  // namespace checksum_detail

/// The checksum of bytes [0, n), and with `copy` not null their copy in the same pass: that of blocks of 8 KB, taken
/// together in order. Every step is a bijection of its state for given input, so one changed word always changes the
/// result.
ML_INLINE uint64_t checksum(const void* data, int64_t n, uint64_t seed = 0, void* copy = nullptr) {
  using namespace checksum_detail;
  const char* from = static_cast<const char*>(data);
  char* to = static_cast<char*>(copy);
  uint64_t h = avalanche(uint64_t(n) ^ seed);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    h = avalanche(h ^ of_block(from + i, size, seed, to == nullptr ? nullptr : to + i));
  }
  return h;
}

}  // namespace ml
