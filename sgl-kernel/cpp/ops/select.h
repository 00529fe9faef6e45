// The best of many by radix: the boundary between kept and dropped candidates, found in three passes over ever fewer of
// them. Included from .inc.cpp files only.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace ml::ML_ISA {

/// Floats as unsigned integers of the same order. -0 sorts below +0; NaN is not expected.
ML_INLINE uint32_t ordered(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
ML_INLINE float unordered(uint32_t key) { return bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key); }

/// Kept are the keys above `key`, and the first `ties` of those equal to it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

constexpr int kDigits = 2048;

struct Histogram {
  int64_t count[kDigits];
  double mass[kDigits];
};

/// The candidates' boundary when kept are those that fewer than `most` precede, and a mass below `limit`. The mass of a
/// candidate is the float that its key stands for, counted only with `weighed`. keys: [n]; work: [n], overwritten.
template <bool weighed>
Cut find_cut(const uint32_t* keys, int64_t n, int64_t most, double limit, uint32_t* work, Histogram& histogram) {
  int64_t before = 0;
  double mass_before = 0.0;
  for (const int shift : {21, 10, 0}) {
    const uint32_t mask = shift == 0 ? 1023u : 2047u;
    std::memset(histogram.count, 0, sizeof(histogram.count));
    if (weighed) std::memset(histogram.mass, 0, sizeof(histogram.mass));
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t digit = keys[i] >> shift & mask;
      ++histogram.count[digit];
      if (weighed) histogram.mass[digit] += double(unordered(keys[i]));
    }
    int64_t digit = mask;
    for (; digit >= 0; --digit) {
      const int64_t count = before + histogram.count[digit];
      const double mass = weighed ? mass_before + histogram.mass[digit] : 0.0;
      if (histogram.count[digit] > 0 && (count >= most || mass >= limit)) break;
      before = count;
      mass_before = mass;
    }
    if (digit < 0) return {0, 0};  // nothing to drop; no candidate's key is 0, that would be a NaN
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      work[kept] = keys[i];
      kept += (keys[i] >> shift & mask) == uint32_t(digit);
    }
    keys = work;
    n = kept;
  }
  int64_t ties = 0;  // what is left is equal
  while (ties < n && before + ties < most && mass_before < limit) {
    mass_before += weighed ? double(unordered(keys[0])) : 0.0;
    ++ties;
  }
  return {keys[0], ties};
}

/// A bound that at least `count` of the values reach, close to the count-th largest; values: [n], n >= count >= 1.
ML_INLINE float reached_by(const float* values, int64_t n, int64_t count, Histogram& histogram) {
  std::memset(histogram.count, 0, sizeof(histogram.count));
  for (int64_t i = 0; i < n; ++i) ++histogram.count[ordered(values[i]) >> 21];
  uint32_t digit = kDigits - 1;
  for (int64_t seen = histogram.count[digit]; seen < count; seen += histogram.count[digit]) --digit;
  const float bound = unordered(digit << 21);
  const float lowest = -__builtin_inff();
  return bound > lowest ? bound : lowest;  // the bucket of -inf begins with NaNs
}

}  // namespace ml::ML_ISA
