// Attention of a few rows over some keys straight from where they lie: packing would cost more than it saves. Every
// number goes through the same chain as in attention_tile.h. Included from .inc.cpp only.
#pragma once

#include "ops/attention_tile.h"

namespace ml::ML_ISA {

/// Rows of keys or values of one head, `stride` bytes apart.
struct RowList {
  const char* first;
  int64_t stride;
  int count;         // scores: a multiple of kLanes; values: of a pair
  int dim;           // numbers in a row
  const char* next;  // as many rows that are needed soon and fetched meanwhile, or null
};

/// For one count R of query rows. q: [R][dim / 16] registers, each 16 numbers twice. scores: R rows of kBlockTokens.
/// weights: R rows of kBlockTokens / 2 pairs. sums: R rows of `ld` floats, taken up where they are unless `fresh`.
struct Direct {
  void (*scores)(const uint32_t* q, const RowList& keys, float* scores);
  void (*values)(const uint32_t* weights, const RowList& values, bool fresh, float* sums, int64_t ld);
};

constexpr int kMostTogether = 4;  // query rows per pass: more find no registers

#if defined(ML_ISA_AVX512)

/// Asks for `bytes` from `at` on of what comes next. Into the second-level cache: the first cannot wait for enough
/// lines at once to keep the memory busy. The requests run through memory in order, so that the hardware guesses the
/// rest.
ML_INLINE void fetch(const char* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 256, at += 256) {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 64, 0, 2);
    __builtin_prefetch(at + 128, 0, 2);
    __builtin_prefetch(at + 192, 0, 2);
  }
}

/// v[i]: eight chains of key 2i, then eight of key 2i + 1. Returns the sums of the chains of 16 keys.
ML_INLINE f32v add_chains(const __m512 (&v)[8]) {
  __m512 low[8], t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    low[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    low[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // t[i + j]: chains j and 4 + j of four keys each
    t[i] = _mm512_shuffle_ps(low[i], low[i + 2], 0x44);
    t[i + 1] = _mm512_shuffle_ps(low[i], low[i + 2], 0xee);
    t[i + 2] = _mm512_shuffle_ps(low[i + 1], low[i + 3], 0x44);
    t[i + 3] = _mm512_shuffle_ps(low[i + 1], low[i + 3], 0xee);
  }
  __m512 sum = _mm512_shuffle_f32x4(t[0], t[4], 0x88);
#pragma GCC unroll 4
  for (int j = 1; j < 4; ++j) sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm512_permutexvar_ps(order, sum);
}

template <class T, int R>
void direct_scores(const uint32_t* q, const RowList& list, float* scores) {
  using A = DotArith;
  const int units = (list.dim + 15) / 16;
  for (int key = 0; key < list.count; key += kLanes) {
    __m512 chains[R][8];
    for (int pair = 0; pair < 8; pair += 2) {
      const int64_t from = (key + 2 * pair) * list.stride;
      if (list.next != nullptr) fetch(list.next + from, 4 * list.stride);
      const T* rows[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) rows[i] = reinterpret_cast<const T*>(list.first + from + i * list.stride);
      f32v sums[R][2];
      clear(sums);
      const auto step = [&](int unit, int left) {
        const int at = 16 * unit;
        const auto first = A::two_rows(rows[0] + at, rows[1] + at, left);
        const auto second = A::two_rows(rows[2] + at, rows[3] + at, left);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto x = A::load(q + (int64_t{r} * units + unit) * kLanes);
          sums[r][0] = A::step(sums[r][0], x, first);
          sums[r][1] = A::step(sums[r][1], x, second);
        }
      };
      const int whole = list.dim / 16;
      for (int unit = 0; unit < whole; ++unit) step(unit, 16);
      if (whole < units) step(whole, list.dim % 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        chains[r][pair] = sums[r][0].v;
        chains[r][pair + 1] = sums[r][1].v;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) add_chains(chains[r]).store(scores + r * kBlockTokens + key);
  }
}

/// C vectors of dimensions from `at` on; whole: the rows reach that far.
template <class T, int R, int C, bool whole>
ML_INLINE void direct_columns(const uint32_t* weights, const RowList& list, int at, bool fresh, float* out,
                              int64_t ld) {
  using A = DotArith;
  f32v sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = fresh ? f32v::zero() : f32v::load(out + r * ld + at + c * kLanes);
  }
  const char* next = at == 0 ? list.next : nullptr;  // whole rows, though this pass may want a part of them
  const char* row = list.first;
  for (int key = 0; key < list.count; key += A::kPair, row += A::kPair * list.stride) {
    const T* pair[A::kPair] = {reinterpret_cast<const T*>(row), reinterpret_cast<const T*>(row + list.stride)};
    if (next != nullptr) {
      fetch(next, A::kPair * list.stride);
      next += A::kPair * list.stride;
    }
    typename A::Wide x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = A::broadcast(weights[(r * kBlockTokens + key) / A::kPair]);
#pragma GCC unroll 4
    for (int c = 0; c < C; c += A::kPair) {
      typename A::Wide lanes[A::kPair];
      A::value_units(pair, at + c * kLanes, whole ? 2 * kLanes : list.dim - at - c * kLanes, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < A::kPair; ++i) sums[r][c + i] = A::step(sums[r][c + i], x[r], lanes[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c].store(out + r * ld + at + c * kLanes);
  }
}

template <class T, int R>
void direct_values(const uint32_t* weights, const RowList& list, bool fresh, float* sums, int64_t ld) {
  constexpr int kWide = R <= 2 ? 8 : 4;
  int at = 0;
  for (; list.dim - at >= kWide * kLanes; at += kWide * kLanes) {
    direct_columns<T, R, kWide, true>(weights, list, at, fresh, sums, ld);
  }
  for (; at < list.dim; at += 2 * kLanes) direct_columns<T, R, 2, false>(weights, list, at, fresh, sums, ld);
}

template <class T, int R>
constexpr Direct direct_for = {direct_scores<T, R>, direct_values<T, R>};

/// By count of rows, less one.
template <class T>
constexpr Direct direct_table[kMostTogether] = {direct_for<T, 1>, direct_for<T, 2>, direct_for<T, 3>, direct_for<T, 4>};

inline const Direct* direct_of(DType type) {
  switch (type) {
    case DType::fp8_e4m3:
      return direct_table<fp8_e4m3>;
    case DType::fp8_e5m2:
      return direct_table<fp8_e5m2>;
    case DType::i8:
      return direct_table<int8_t>;
    default:
      return direct_table<bf16>;
  }
}

#endif

}  // namespace ml::ML_ISA
