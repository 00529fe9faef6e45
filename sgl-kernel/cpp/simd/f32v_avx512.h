// 16 lanes of float32 on AVX-512 (F, BW, DQ, VL, BF16).
#pragma once

#include <immintrin.h>

#include "base/types.h"

namespace ml::ML_ISA {

struct f32v {
  static constexpr int N = 16;
  __m512 v;

  ML_INLINE f32v() = default;
  ML_INLINE f32v(__m512 value) : v(value) {}

  static ML_INLINE f32v zero() { return _mm512_setzero_ps(); }
  static ML_INLINE f32v set(float x) { return _mm512_set1_ps(x); }

  static ML_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }

  static ML_INLINE f32v from_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  /// e4m3 moved into the bits of float16 has an exponent 8 too small. 0x7f (NaN) becomes NaN by hand.
  static ML_INLINE f32v from_e4m3(__m128i x) {
    const __m256i wide = _mm256_cvtepu8_epi16(x);
    const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
    const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    return _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
  }
  static ML_INLINE f32v from_e5m2(__m128i x) { return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8)); }

  static ML_INLINE f32v load(const float* p) { return _mm512_loadu_ps(p); }
  static ML_INLINE f32v load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static ML_INLINE f32v load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static ML_INLINE f32v load(const fp8_e4m3* p) { return from_e4m3(_mm_loadu_si128((const __m128i*)p)); }
  static ML_INLINE f32v load(const fp8_e5m2* p) { return from_e5m2(_mm_loadu_si128((const __m128i*)p)); }
  static ML_INLINE f32v load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }

  // The first n < N elements; the other lanes are zero and their memory is not touched.
  static ML_INLINE f32v load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static ML_INLINE f32v load(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static ML_INLINE f32v load(const fp16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static ML_INLINE f32v load(const fp8_e4m3* p, int n) { return from_e4m3(_mm_maskz_loadu_epi8(first(n), p)); }
  static ML_INLINE f32v load(const fp8_e5m2* p, int n) { return from_e5m2(_mm_maskz_loadu_epi8(first(n), p)); }
  static ML_INLINE f32v load(const int8_t* p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
  }

  ML_INLINE __m256i to_bf16() const { return (__m256i)_mm512_cvtneps_pbh(v); }
  ML_INLINE __m256i to_fp16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  ML_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  ML_INLINE void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, to_bf16()); }
  ML_INLINE void store(fp16* p) const { _mm256_storeu_si256((__m256i*)p, to_fp16()); }
  ML_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  ML_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  ML_INLINE void store(fp16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_fp16()); }
};

ML_INLINE f32v operator+(f32v a, f32v b) { return _mm512_add_ps(a.v, b.v); }
ML_INLINE f32v operator-(f32v a, f32v b) { return _mm512_sub_ps(a.v, b.v); }
ML_INLINE f32v operator*(f32v a, f32v b) { return _mm512_mul_ps(a.v, b.v); }
ML_INLINE f32v operator/(f32v a, f32v b) { return _mm512_div_ps(a.v, b.v); }
ML_INLINE f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
ML_INLINE f32v max(f32v a, f32v b) { return _mm512_max_ps(a.v, b.v); }
ML_INLINE f32v min(f32v a, f32v b) { return _mm512_min_ps(a.v, b.v); }
ML_INLINE f32v abs(f32v a) { return _mm512_abs_ps(a.v); }
ML_INLINE f32v sqrt(f32v a) { return _mm512_sqrt_ps(a.v); }

/// To the nearest integer, ties to even.
ML_INLINE f32v round(f32v a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/// 2^n for an integral n in [-126, 127].
ML_INLINE f32v pow2(f32v n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

/// Per lane: a < b ? yes : no.
ML_INLINE f32v select_less(f32v a, f32v b, f32v yes, f32v no) {
  return _mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), yes.v);
}

/// Per lane: x where x is NaN, else `other`.
ML_INLINE f32v select_unordered(f32v x, f32v other) {
  return _mm512_mask_mov_ps(other.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v);
}

/// Halves added until one lane is left: (0+8, 1+9 ...), then 4, 2, 1 apart.
ML_INLINE float sum(f32v a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

ML_INLINE float max(f32v a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace ml::ML_ISA
