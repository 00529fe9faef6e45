// Attention of a few rows over one block straight from where keys and values lie: packing would cost more than it
// saves. Every number goes through the same chain as in attention_tile.h. Included from .inc.cpp only.
#pragma once

#include "ops/attention_pack.h"

namespace ml::ML_ISA {

/// Rows in the order in which they are needed, and some that are needed after them: to be fetched in good time.
struct RowList {
  const char* const* rows;  // [kBlockTokens], by key
  int dim;                  // numbers in a row
  const char* const* next;  // [next_count]
  int next_count;
};

/// For one count of query rows; arguments as of tile_scores and tile_values.
template <class A>
struct Direct {
  using Unit = typename A::Unit;
  void (*scores)(const Unit* q, int64_t ldq, const RowList& rows, int begin, int end, float* scores);
  void (*values)(const Unit* weights, const RowList& rows, int begin, int end, const RowMerge* merge, float* out,
                 int64_t ldo);
};

#if defined(ML_ISA_AVX512)

/// Steps [0, count) of 16 keys that were just transposed.
template <class A, int R>
ML_INLINE void direct_steps(const typename A::Unit* q, int64_t ldq, const typename A::Wide (&keys)[kLanes], int count,
                            f32v (&sums)[R]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i >= count) break;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = A::step(sums[r], A::broadcast(q[r * ldq + i]), keys[i]);
  }
}

/// Asks for row `key` + kAhead. Into the second-level cache: the first cannot wait for enough lines at once to keep the
/// memory busy, and rows of one head lie too far apart for the hardware to guess them.
ML_INLINE void fetch_ahead(const RowList& list, int key, int end, int64_t bytes) {
  const int wanted = key + kAhead;
  const char* row;
  if (wanted < end) {
    row = list.rows[wanted];
  } else if (wanted - end < list.next_count) {
    row = list.next[wanted - end];
  } else {
    return;
  }
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(row + at, 0, 2);
}

template <class A, class T, int R>
void direct_scores(const typename A::Unit* q, int64_t ldq, const RowList& list, int begin, int end, float* scores) {
  const char* const* rows = list.rows;
  const int dim = list.dim, steps = (dim + A::kPair - 1) / A::kPair;
  for (int key = begin; key < end; key += kLanes) {
    f32v sums[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = f32v::zero();
    for (int step = 0; step < steps; step += kLanes) {
      typename A::Wide t[kLanes];
      const int at = step * A::kPair;
      const int part = step / kLanes, parts = (steps + kLanes - 1) / kLanes;
      for (int i = kLanes * part / parts; i < kLanes * (part + 1) / parts; ++i) {
        fetch_ahead(list, key + i, end, dim * int64_t{sizeof(T)});
      }
      if (steps - step >= kLanes && dim - at >= A::kPair * kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          t[i] = A::row_units(reinterpret_cast<const T*>(rows[key + i]) + at, A::kPair * kLanes);
        transpose(t);
        direct_steps<A, R>(q + step, ldq, t, kLanes, sums);
      } else {
        for (int i = 0; i < kLanes; ++i) t[i] = A::row_units(reinterpret_cast<const T*>(rows[key + i]) + at, dim - at);
        transpose(t);
        direct_steps<A, R>(q + step, ldq, t, steps - step, sums);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r].store(scores + r * kBlockTokens + key);
  }
}

/// Lanes [0, C * 16) of the values of keys [begin, end).
template <class A, class T, int R, int C>
ML_INLINE void direct_columns(const typename A::Unit* weights, const RowList& list, int at, int begin, int end,
                              f32v (&sums)[R][C]) {
  constexpr int kSteps = kBlockTokens / A::kPair;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = f32v::zero();
  }
  for (int key = begin; key < end; key += A::kPair) {
    if (at == 0) {  // whole rows, though this pass may want a part of them
      for (int i = 0; i < A::kPair; ++i) fetch_ahead(list, key + i, end, list.dim * int64_t{sizeof(T)});
    }
    const T* pair[A::kPair];
#pragma GCC unroll 2
    for (int i = 0; i < A::kPair; ++i) pair[i] = reinterpret_cast<const T*>(list.rows[key + i]);
#pragma GCC unroll 4
    for (int c = 0; c < C; c += A::kPair) {
      typename A::Wide lanes[A::kPair];
      A::value_units(pair, at + c * kLanes, list.dim - at - c * kLanes, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto weight = A::broadcast(weights[r * kSteps + key / A::kPair]);
#pragma GCC unroll 2
        for (int i = 0; i < A::kPair; ++i) sums[r][c + i] = A::step(sums[r][c + i], weight, lanes[i]);
      }
    }
  }
}

template <class A, class T, int R>
void direct_values(const typename A::Unit* weights, const RowList& list, int begin, int end, const RowMerge* merge,
                   float* out, int64_t ldo) {
  constexpr int kWide = R <= 2 ? 8 : 4;
  for (int at = 0; at < list.dim;) {
    if (list.dim - at >= kWide * kLanes) {
      f32v sums[R][kWide];
      direct_columns<A, T, R, kWide>(weights, list, at, begin, end, sums);
      put_values<R, kWide>(sums, merge, out + at, ldo);
      at += kWide * kLanes;
    } else {
      f32v sums[R][2];
      direct_columns<A, T, R, 2>(weights, list, at, begin, end, sums);
      put_values<R, 2>(sums, merge, out + at, ldo);
      at += 2 * kLanes;
    }
  }
}

template <class A, class T, int R>
constexpr Direct<A> direct_for = {direct_scores<A, T, R>, direct_values<A, T, R>};

template <class A, class T>
constexpr Direct<A> direct_table[kTileRows] = {direct_for<A, T, 1>, direct_for<A, T, 2>, direct_for<A, T, 3>,
                                               direct_for<A, T, 4>, direct_for<A, T, 5>, direct_for<A, T, 6>};

/// Pairs of bf16 only: with one product per step the keys must be widened, which packing does once.
template <class A, class T>
const Direct<A>* direct_of() {
  if constexpr (A::kPair == 2) {
    return direct_table<A, T>;
  } else {
    return nullptr;
  }
}

#else

template <class A, class T>
const Direct<A>* direct_of() {
  return nullptr;
}

#endif

}  // namespace ml::ML_ISA
