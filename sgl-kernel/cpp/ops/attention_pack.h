// Rows of a block of keys and values, wherever they lie, -> packed panels (see attention_tile.h). Included from
// .inc.cpp only.
#pragma once

#include "ops/attention_tile.h"

namespace ml::ML_ISA {

constexpr int kLine = 64;
constexpr int kPackAhead = 32;  // rows that are on their way while one is used

/// Into the second-level cache, see fetch_ahead.
ML_INLINE void prefetch_rows(const char* const* rows, int count, int64_t bytes) {
  for (int i = 0; i < count; ++i) {
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(rows[i] + at, 0, 2);
  }
}

/// Keys [begin, end), multiples of kHalf, from rows[key] of `dim` numbers.
template <class A, class T>
void pack_keys(const char* const* rows, int begin, int end, int dim, typename A::Unit* out) {
  const int steps = (dim + A::kPair - 1) / A::kPair;
  for (int key = begin; key < end; key += kLanes) {
    if (key + kPackAhead < end) prefetch_rows(rows + key + kPackAhead, kLanes, dim * int64_t{sizeof(T)});
    typename A::Unit* to = out + int64_t{key / kPanel} * kPanel * steps + key % kPanel;
    for (int step = 0; step < steps; step += kLanes) {
      typename A::Wide t[kLanes];
      const int at = step * A::kPair;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) t[i] = A::row_units(reinterpret_cast<const T*>(rows[key + i]) + at, dim - at);
      transpose(t);
      const int left = steps - step < kLanes ? steps - step : kLanes;
      for (int i = 0; i < left; ++i) A::store(to + int64_t{step + i} * kPanel, t[i]);
    }
  }
}

/// Values of keys [begin, end) from rows[key] of `dim` numbers; dimensions up to the next multiple of kHalf are zero.
template <class A, class T>
void pack_values(const char* const* rows, int begin, int end, int dim, typename A::Unit* out) {
  constexpr int kSteps = kBlockTokens / A::kPair;
  const int dims = (dim + kHalf - 1) / kHalf * kHalf;
  for (int key = begin; key < end; key += A::kPair) {
    if (key + kPackAhead < end) prefetch_rows(rows + key + kPackAhead, A::kPair, dim * int64_t{sizeof(T)});
    const T* pair[A::kPair];
#pragma GCC unroll 2
    for (int i = 0; i < A::kPair; ++i) pair[i] = reinterpret_cast<const T*>(rows[key + i]);
    typename A::Unit* to = out + int64_t{key / A::kPair} * kPanel;
    for (int at = 0; at < dims; at += A::kPair * kLanes) {
      typename A::Wide units[A::kPair] = {};
      if (at < dim) A::value_units(pair, at, dim - at, units);
#pragma GCC unroll 2
      for (int i = 0; i < A::kPair; ++i) {
        const int lane = at + i * kLanes;
        A::store(to + int64_t{lane / kPanel} * kSteps * kPanel + lane % kPanel, units[i]);
      }
    }
  }
}

}  // namespace ml::ML_ISA
