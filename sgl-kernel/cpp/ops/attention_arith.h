// The two arithmetics of attention, and how stored keys and values become their operands. Included from .inc.cpp only.
//
// A product of an [R, S] matrix with an [S, C] one is a chain of S steps per output: out = step(out, a[r][s], b[s][c]).
// FmaArith: a step is one float32 multiply-add. DotArith: a and b hold pairs of bf16, a step adds both products in
// float32 (vdpbf16ps). `Unit` is one a or b of a step: a float, or a pair.
//
// The product of queries and keys is kChains chains: step s belongs to chain s % kChains, and the chains are added in
// order at the end. With eight of them the units of two keys fill a register as they lie in memory, see
// attention_direct.h.
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

// GCC 12 reads a vector that several rows multiply from memory again for each of them, and a core reads no more than
// one per cycle. What went through here stays in its register.
#if defined(ML_X86) && !defined(ML_ISA_GENERIC)
template <class V>
ML_INLINE V kept(V vector) {
  asm("" : "+v"(vector));
  return vector;
}
ML_INLINE f32v kept(f32v vector) { return kept(vector.v); }
#else
ML_INLINE f32v kept(f32v vector) { return vector; }
#endif

struct FmaArith {
  using Unit = float;
  using Wide = f32v;               // N units
  static constexpr int kPair = 1;  // numbers in a unit
  static constexpr int kChains = 1;

  static ML_INLINE Wide load(const Unit* p) { return kept(f32v::load(p)); }
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
  static constexpr int kChains = 8;

  static ML_INLINE Wide load(const Unit* p) { return kept(_mm512_loadu_si512(p)); }
  static ML_INLINE void store(Unit* p, Wide v) { _mm512_storeu_si512(p, v); }
  static ML_INLINE Wide broadcast(Unit a) { return _mm512_set1_epi32(int(a)); }
  static ML_INLINE f32v step(f32v sum, Wide a, Wide b) { return _mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b); }

  static ML_INLINE Wide join(f32v low, f32v high) { return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v); }

  /// 32 numbers of a row as bf16; `left` of them exist. int8 and fp8 are exact in bf16.
  static ML_INLINE Wide row_units(const bf16* row, int left) {
    if (left >= 32) return _mm512_loadu_si512(row);
    return _mm512_maskz_loadu_epi16((1u << left) - 1u, row);
  }
  static ML_INLINE Wide row_units(const fp8_e4m3* row, int left) { return from_e4m3(row_bytes(row, left)); }
  static ML_INLINE Wide row_units(const fp8_e5m2* row, int left) { return from_e5m2(row_bytes(row, left)); }
  template <class T>
  static ML_INLINE Wide row_units(const T* row, int left) {
    if (left >= 32) return join(f32v::load(row), f32v::load(row + 16));
    const f32v high = left > 16 ? f32v::load(row + 16, left - 16) : f32v::zero();
    return join(left >= 16 ? f32v::load(row) : f32v::load(row, left), high);
  }

  /// 16 numbers of row a, then 16 of row b; `left` of them exist in each.
  static ML_INLINE Wide two_rows(const bf16* a, const bf16* b, int left) {
    if (left >= 16) {
      const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a));
      return _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)b), 1);
    }
    const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(f32v::first(left), a));
    return _mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(f32v::first(left), b), 1);
  }
  static ML_INLINE Wide two_rows(const fp8_e4m3* a, const fp8_e4m3* b, int left) {
    return from_e4m3(two_rows_bytes(a, b, left));
  }
  static ML_INLINE Wide two_rows(const fp8_e5m2* a, const fp8_e5m2* b, int left) {
    return from_e5m2(two_rows_bytes(a, b, left));
  }
  static ML_INLINE Wide two_rows(const int8_t* a, const int8_t* b, int left) {
    if (left >= 16) return join(f32v::load(a), f32v::load(b));
    return join(f32v::load(a, left), f32v::load(b, left));
  }

  /// Dimensions [0, 32) of two value rows, each pair together.
  template <class T>
  static ML_INLINE void value_units(const T* const* rows, int dim, int left, Wide (&out)[kPair]) {
    const __m512i a = row_units(rows[0] + dim, left), b = row_units(rows[1] + dim, left);
    out[0] = _mm512_permutex2var_epi16(a, zip_index(0), b);
    out[1] = _mm512_permutex2var_epi16(a, zip_index(16), b);
  }

  static ML_INLINE void pack_weights(const f32v (&p)[kPair], Unit* out) { store(out, join(p[0], p[1])); }
  /// Half as many.
  static ML_INLINE void pack_weights(f32v p, Unit* out) {
    _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(p.v));
  }

 private:
  static ML_INLINE __m256i row_bytes(const void* row, int left) {
    const __mmask32 there = left >= 32 ? __mmask32(~0u) : __mmask32((1u << left) - 1u);
    return _mm256_maskz_loadu_epi8(there, row);
  }
  static ML_INLINE __m256i two_rows_bytes(const void* a, const void* b, int left) {
    const __mmask16 there = left >= 16 ? __mmask16(0xffff) : f32v::first(left);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi8(there, a)),
                                   _mm_maskz_loadu_epi8(there, b), 1);
  }

  /// Exponent and mantissa of e4m3 stand where bf16 has them after a shift by 4; the bias differs by 120. Subnormals,
  /// m * 2^-9, and NaN (0x7f) come from a table of 32 words, by the byte's low bits.
  static ML_INLINE Wide from_e4m3(__m256i bytes) {
    const __m512i odd = _mm512_setr_epi32(0x3b000000, 0x3bc03b80, 0x3c203c00, 0x3c603c40, 0, 0, 0, 0,  //
                                          0, 0, 0, 0, 0, 0, 0, 0x7fc00000);
    return from_fp8<4, 120, 1, 9>(bytes, odd);
  }
  /// Of e5m2 after a shift by 5, 112 apart. Subnormals are m * 2^-16, 0x7c is infinity, what follows is NaN.
  static ML_INLINE Wide from_e5m2(__m256i bytes) {
    const __m512i odd = _mm512_setr_epi32(0x37800000, 0x38403800, 0, 0, 0, 0, 0, 0,  //
                                          0, 0, 0, 0, 0, 0, 0x7fc07f80, 0x7fc07fc0);
    return from_fp8<5, 112, 4, 8>(bytes, odd);
  }

  /// odd: the words of those magnitudes that the shift does not get right: as signed bytes, magnitude + turn < below.
  template <int shift, int bias, int turn, int below>
  static ML_INLINE Wide from_fp8(__m256i bytes, __m512i odd) {
    const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi8(0x7f));
    const __mmask32 is_odd =
        _mm256_cmplt_epi8_mask(_mm256_add_epi8(magnitude, _mm256_set1_epi8(turn)), _mm256_set1_epi8(below));
    const __m512i wide = _mm512_cvtepu8_epi16(magnitude);
    const __m512i plain = _mm512_add_epi16(_mm512_slli_epi16(wide, shift), _mm512_set1_epi16(bias << 7));
    const __m512i value = _mm512_mask_permutexvar_epi16(plain, is_odd, wide, odd);
    constexpr int kOrAnd = 0xf8;  // value | (sign & 0x8000)
    return _mm512_ternarylogic_epi32(value, _mm512_cvtepi8_epi16(bytes), _mm512_set1_epi16(-0x8000), kOrAnd);
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
