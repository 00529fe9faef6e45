// The two arithmetics of attention, and how stored keys and values become their operands. Included from .inc.cpp only.
//
// A product of an [R, S] matrix with an [S, C] one is a chain of S steps per output: out = step(out, a[r][s], b[s][c]).
// FmaArith: a step is one float32 multiply-add. DotArith: a and b hold pairs of bf16, a step adds both products in
// float32 (vdpbf16ps). `Unit` is one a or b of a step: a float, or a pair.
#pragma once

#include "base/types.h"
#include "simd/vec.h"

namespace ml::ML_ISA {

#if defined(ML_ISA_AVX512)

/// Lane j of t[i] goes to lane i of t[j].
ML_INLINE void transpose(__m512i (&t)[16]) {
  __m512i u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // now t[i + k] holds columns k, k + 4, k + 8, k + 12 of rows i .. i + 3
    t[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i a = _mm512_shuffle_i32x4(t[k], t[k + 4], 0x88), b = _mm512_shuffle_i32x4(t[k], t[k + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[k + 8], t[k + 12], 0x88),
                  d = _mm512_shuffle_i32x4(t[k + 8], t[k + 12], 0xdd);
    u[k] = _mm512_shuffle_i32x4(a, c, 0x88);
    u[k + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    u[k + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    u[k + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) t[i] = u[i];
}

ML_INLINE void transpose(f32v (&t)[16]) {
  __m512i u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) u[i] = _mm512_castps_si512(t[i].v);
  transpose(u);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) t[i] = _mm512_castsi512_ps(u[i]);
}

#elif defined(ML_ISA_AVX2)

ML_INLINE void transpose(f32v (&t)[8]) {
  __m256 u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_ps(t[i].v, t[i + 1].v);
    u[i + 1] = _mm256_unpackhi_ps(t[i].v, t[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    t[i] = _mm256_shuffle_ps(u[i], u[i + 2], 0x44);
    t[i + 1] = _mm256_shuffle_ps(u[i], u[i + 2], 0xee);
    t[i + 2] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0x44);
    t[i + 3] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m256 low = _mm256_permute2f128_ps(t[k].v, t[k + 4].v, 0x20);
    t[k + 4] = _mm256_permute2f128_ps(t[k].v, t[k + 4].v, 0x31);
    t[k] = low;
  }
}

#else

ML_INLINE void transpose(f32v (&t)[f32v::N]) {
  for (int i = 0; i < f32v::N; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = t[i].v[j];
      t[i].v[j] = t[j].v[i];
      t[j].v[i] = kept;
    }
  }
}

#endif

struct FmaArith {
  using Unit = float;
  using Wide = f32v;               // N units
  static constexpr int kPair = 1;  // numbers in a unit

  static ML_INLINE Wide load(const Unit* p) { return f32v::load(p); }
  static ML_INLINE void store(Unit* p, Wide v) { v.store(p); }
  static ML_INLINE Wide broadcast(Unit a) { return f32v::set(a); }
  static ML_INLINE f32v step(f32v sum, Wide a, Wide b) { return fma(a, b, sum); }

  /// Units [0, N) of a row; `left` numbers of it exist, the others are zero.
  template <class T>
  static ML_INLINE Wide row_units(const T* row, int left) {
    return left >= f32v::N ? f32v::load(row) : f32v::load(row, left);
  }

  /// Dimensions [0, N) of the value rows of one step.
  template <class T>
  static ML_INLINE void value_units(const T* const* rows, int dim, int left, Wide (&out)[kPair]) {
    out[0] = row_units(rows[0] + dim, left);
  }

  static ML_INLINE void pack_weights(const f32v (&p)[kPair], Unit* out) { p[0].store(out); }
};

#if defined(ML_ISA_AVX512)

struct DotArith {
  using Unit = uint32_t;
  using Wide = __m512i;
  static constexpr int kPair = 2;

  static ML_INLINE Wide load(const Unit* p) { return _mm512_loadu_si512(p); }
  static ML_INLINE void store(Unit* p, Wide v) { _mm512_storeu_si512(p, v); }
  static ML_INLINE Wide broadcast(Unit a) { return _mm512_set1_epi32(int(a)); }
  static ML_INLINE f32v step(f32v sum, Wide a, Wide b) { return _mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b); }

  static ML_INLINE Wide join(f32v low, f32v high) { return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v); }

  /// 32 numbers of a row as bf16; `left` of them exist. int8 and fp8 are exact in bf16.
  static ML_INLINE Wide row_units(const bf16* row, int left) {
    if (left >= 32) return _mm512_loadu_si512(row);
    return _mm512_maskz_loadu_epi16((1u << left) - 1u, row);
  }
  static ML_INLINE Wide row_units(const fp8_e4m3* row, int left) {
    const __mmask32 there = left >= 32 ? __mmask32(~0u) : __mmask32((1u << left) - 1u);
    return from_e4m3(_mm256_maskz_loadu_epi8(there, row));
  }
  template <class T>
  static ML_INLINE Wide row_units(const T* row, int left) {
    if (left >= 32) return join(f32v::load(row), f32v::load(row + 16));
    const f32v high = left > 16 ? f32v::load(row + 16, left - 16) : f32v::zero();
    return join(left >= 16 ? f32v::load(row) : f32v::load(row, left), high);
  }

  /// Dimensions [0, 32) of two value rows, each pair together.
  template <class T>
  static ML_INLINE void value_units(const T* const* rows, int dim, int left, Wide (&out)[kPair]) {
    const __m512i a = row_units(rows[0] + dim, left), b = row_units(rows[1] + dim, left);
    out[0] = _mm512_permutex2var_epi16(a, zip_index(0), b);
    out[1] = _mm512_permutex2var_epi16(a, zip_index(16), b);
  }

  static ML_INLINE void pack_weights(const f32v (&p)[kPair], Unit* out) { store(out, join(p[0], p[1])); }

 private:
  /// Four exponent bits and three of mantissa stand where bf16 has them after a shift; the bias differs by 120.
  /// Subnormals come from a table, 0x7f is NaN.
  static ML_INLINE Wide from_e4m3(__m256i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x80)), 8);
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    // bf16 of 0, 1, .. 7 times 2^-9.
    const __m512i tiny = _mm512_set4_epi32(0x3c603c40, 0x3c203c00, 0x3bc03b80, 0x3b000000);
    const __m512i value = _mm512_mask_permutexvar_epi16(normal, small, magnitude, tiny);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    return _mm512_or_si512(sign, _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0)));
  }

  /// Words first, first of b, first + 1, first + 1 of b, ...
  static ML_INLINE __m512i zip_index(int first) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i word = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    return _mm512_or_si512(word, _mm512_slli_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(32)), 16));
  }
};

#endif

}  // namespace ml::ML_ISA
