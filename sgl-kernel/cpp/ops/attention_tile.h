// The inner loops of attention over one block of keys: R query rows times packed keys, softmax, times packed values.
// Included from .inc.cpp only.
//
// Packed operands lie in panels of kPanel lanes: [panel][step][lane]. The lanes of keys are tokens, those of values are
// dimensions. How many rows or lanes are computed together never touches the chain of one output.
#pragma once

#include "ops/attention_arith.h"
#include "ops/attention_plan.h"

namespace ml::ML_ISA {

#if defined(ML_ISA_AVX512)
constexpr int kTileRows = 6, kTileCols = 4;  // 24 of 32 registers
#else
constexpr int kTileRows = 4, kTileCols = 2;
#endif
constexpr int kLanes = f32v::N;
constexpr int kPanel = kTileCols * kLanes;
constexpr int kHalf = 2 * kLanes;  // tails are computed in steps of this many lanes
constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr float kLowest = -1e30f;  // stands in for the largest score when all are -inf

/// 2^x for x <= 0 within 1.5 ulp; 0 for -inf, NaN for NaN.
ML_INLINE f32v exp2(f32v x) {
#if defined(ML_ISA_AVX512)
  // 2^f for 0 <= f < 1. vscalefps takes the floor of its exponent, and the fraction of -inf is 0.
  constexpr float kSeries[] = {1.0f, 0.693151295f, 0.240164444f, 0.0557999127f, 0.00901702885f, 0.00186713052f};
  const f32v fraction = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(fraction, kSeries).v, x.v);
#else
  constexpr float kSeries[] = {1.0f, 0.693147f, 0.24022242f, 0.055507336f, 0.009671513f, 0.0013264727f};
  const f32v lowest = f32v::set(-126.0f), inside = max(lowest, x);
  const f32v n = round(inside);
  const f32v scaled = polynomial(inside - n, kSeries) * pow2(max(lowest, n));
  return select_unordered(x, select_less(x, lowest, f32v::zero(), scaled));
#endif
}

/// sums[r][c] += steps first, first + stride ... of a[r][step] times lanes c of b[step]. b: [steps, kPanel].
template <class A, int R, int C>
ML_INLINE void multiply(const typename A::Unit* a, int64_t lda, const typename A::Unit* b, int first, int stride,
                        int steps, f32v (&sums)[R][C]) {
  for (int s = first; s < steps; s += stride) {
    typename A::Wide lanes[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) lanes[c] = A::load(b + int64_t{s} * kPanel + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = A::broadcast(a[r * lda + s]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = A::step(sums[r][c], x, lanes[c]);
    }
  }
}

template <int R, int C>
ML_INLINE void clear(f32v (&sums)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = f32v::zero();
  }
}

/// How a block's values enter a row: out = out * keep + values * add.
struct RowMerge {
  float keep, add;
};

/// Takes the products of one block and some lanes into R output rows of `ldo` floats; merge null: writes them bare.
template <int R, int C>
ML_INLINE void put_values(const f32v (&sums)[R][C], const RowMerge* merge, float* out, int64_t ldo) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = out + r * ldo + c * kLanes;
      if (merge == nullptr) {
        sums[r][c].store(to);
      } else {
        fma(f32v::load(to), f32v::set(merge[r].keep), sums[r][c] * f32v::set(merge[r].add)).store(to);
      }
    }
  }
}

/// How raw scores become weights; the same for all rows of a call and head.
struct ScoreRule {
  float scale;             // times log2 e when there is no softcap: scores are then used as they come
  float softcap;           // 0: none
  float cap_scale;         // scale / softcap
  const float* key_scale;  // [kBlockTokens] of this block's keys, or null
  const float* value_scale;
};

/// One row of one block.
struct RowRange {
  int32_t low, high;  // keys [low, high) of the block are visible
};

/// sums[r][c] = the chains of a row of a and lanes c of b, added up.
template <class A, int R, int C>
ML_INLINE void multiply_chains(const typename A::Unit* a, int64_t lda, const typename A::Unit* b, int steps,
                               f32v (&sums)[R][C]) {
  clear(sums);
  multiply<A, R, C>(a, lda, b, 0, A::kChains, steps, sums);
  for (int chain = 1; chain < A::kChains; ++chain) {
    f32v more[R][C];
    clear(more);
    multiply<A, R, C>(a, lda, b, chain, A::kChains, steps, more);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] += more[r][c];
    }
  }
}

/// Scores of C vectors of keys. A chain and its sum need twice the registers: the rows are halved then, and the keys
/// found in the first-level cache by the second half.
template <class A, int R, int C>
ML_INLINE void tile_columns(const typename A::Unit* q, int64_t ldq, const typename A::Unit* keys, int steps,
                            float* scores) {
  if constexpr (A::kChains > 1 && R > kTileRows / 2) {
    tile_columns<A, R / 2, C>(q, ldq, keys, steps, scores);
    tile_columns<A, R - R / 2, C>(q + R / 2 * ldq, ldq, keys, steps, scores + R / 2 * kBlockTokens);
  } else {
    f32v sums[R][C];
    multiply_chains<A, R, C>(q, ldq, keys, steps, sums);
    put_values<R, C>(sums, nullptr, scores, kBlockTokens);
  }
}

/// Scores of keys [begin, end) of the block (multiples of kHalf), R rows of kBlockTokens floats.
template <class A, int R>
ML_INLINE void tile_scores(const typename A::Unit* q, int64_t ldq, const typename A::Unit* keys, int steps, int begin,
                           int end, float* scores) {
  for (int at = begin; at < end;) {
    const typename A::Unit* from = keys + int64_t{at / kPanel} * kPanel * steps + at % kPanel;
    if (at % kPanel == 0 && end - at >= kPanel) {
      tile_columns<A, R, kTileCols>(q, ldq, from, steps, scores + at);
      at += kPanel;
    } else {
      tile_columns<A, R, 2>(q, ldq, from, steps, scores + at);
      at += kHalf;
    }
  }
}

/// Scores that need more than one scale for the whole row: per-key scales, softcap.
ML_INLINE void shape_scores(const ScoreRule& rule, int begin, int end, float* scores) {
  if (rule.key_scale != nullptr) {
    for (int j = begin; j < end; j += kLanes) {
      (f32v::load(scores + j) * f32v::load(rule.key_scale + j)).store(scores + j);
    }
  }
  if (rule.softcap != 0.0f) {
    const f32v in = f32v::set(rule.cap_scale), out = f32v::set(rule.softcap);
    for (int j = begin; j < end; j += kLanes) (out * tanh(f32v::load(scores + j) * in)).store(scores + j);
  }
}

/// Scores of keys [begin, end) -> weights 2^(scale * score - top) of the visible ones, 0 for the others, as operands of
/// the product with the values; not `pack`: the weights take the places of the scores, without value_scale. Returns
/// top, and the sum of the weights in *total.
template <class A, bool pack = true>
ML_INLINE float soften(const ScoreRule& rule, RowRange range, int begin, int end, float* scores,
                       typename A::Unit* weights, float* total) {
  shape_scores(rule, begin, end, scores);
  for (int j = begin; j < range.low; ++j) scores[j] = kHidden;
  for (int j = range.high; j < end; ++j) scores[j] = kHidden;
  f32v top = f32v::set(kLowest);
  for (int j = begin; j < end; j += kLanes) top = max(top, f32v::load(scores + j));
  const float largest = max(top);
  // The difference first: scale * score - scale * largest, fused, could be above 0 by a rounding of a huge product.
  const f32v scale = f32v::set(rule.scale), shift = f32v::set(largest);
  f32v sum_of = f32v::zero();
  for (int j = begin; j < end; j += A::kPair * kLanes) {
    f32v p[A::kPair];
#pragma GCC unroll 2
    for (int i = 0; i < A::kPair; ++i) {
      p[i] = exp2((f32v::load(scores + j + i * kLanes) - shift) * scale);
      sum_of += p[i];
      if constexpr (!pack) {
        p[i].store(scores + j + i * kLanes);
      } else if (rule.value_scale != nullptr) {
        p[i] *= f32v::load(rule.value_scale + j + i * kLanes);
      }
    }
    if constexpr (pack) A::pack_weights(p, weights + j / A::kPair);
  }
  *total = sum(sum_of);
  return largest * rule.scale;
}

/// Weights of keys [begin, end) times packed values -> out: R rows of `ldo` floats, `dims` of them (a multiple of
/// kHalf). merge: R entries, or null to write the bare product.
template <class A, int R>
ML_INLINE void tile_values(const typename A::Unit* weights, const typename A::Unit* values, int begin, int end,
                           int dims, const RowMerge* merge, float* out, int64_t ldo) {
  constexpr int kSteps = kBlockTokens / A::kPair;
  const int first = begin / A::kPair, steps = (end - begin) / A::kPair;
  const auto columns = [&](auto& sums, int at) {
    constexpr int C = sizeof(sums[0]) / sizeof(sums[0][0]);
    const typename A::Unit* panel = values + (int64_t{at / kPanel} * kSteps + first) * kPanel + at % kPanel;
    clear(sums);
    multiply<A, R, C>(weights + first, kSteps, panel, 0, 1, steps, sums);
    put_values<R, C>(sums, merge, out + at, ldo);
    return at + C * kLanes;
  };
  for (int at = 0; at < dims;) {
    if (at % kPanel == 0 && dims - at >= kPanel) {
      f32v sums[R][kTileCols];
      at = columns(sums, at);
    } else {
      f32v sums[R][2];
      at = columns(sums, at);
    }
  }
}

}  // namespace ml::ML_ISA
