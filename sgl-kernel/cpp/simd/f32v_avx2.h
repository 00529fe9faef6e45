// 8 lanes of float32 on AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "base/types.h"

namespace ml::ML_ISA {

struct f32v {
  static constexpr int N = 8;
  __m256 v;

  ML_INLINE f32v() = default;
  ML_INLINE f32v(__m256 value) : v(value) {}

  static ML_INLINE f32v zero() { return _mm256_setzero_ps(); }
  static ML_INLINE f32v set(float x) { return _mm256_set1_ps(x); }

  static ML_INLINE f32v from_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  /// e4m3 moved into the bits of float16 has an exponent 8 too small. 0x7f (NaN) becomes NaN by hand.
  static ML_INLINE f32v from_e4m3(__m128i x) {
    const __m128i wide = _mm_cvtepu8_epi16(x);
    const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i half = _mm_or_si128(sign, _mm_slli_epi16(magnitude, 7));
    const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(nan)));
  }
  static ML_INLINE f32v from_e5m2(__m128i x) { return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(x), 8)); }

  static ML_INLINE f32v load(const float* p) { return _mm256_loadu_ps(p); }
  static ML_INLINE f32v load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
  static ML_INLINE f32v load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static ML_INLINE f32v load(const fp8_e4m3* p) { return from_e4m3(_mm_loadl_epi64((const __m128i*)p)); }
  static ML_INLINE f32v load(const fp8_e5m2* p) { return from_e5m2(_mm_loadl_epi64((const __m128i*)p)); }
  static ML_INLINE f32v load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }

  /// The first n < N elements; the other lanes are zero and their memory is not touched.
  template <class T>
  static ML_INLINE f32v load(const T* p, int n) {
    T padded[N] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
  }

  ML_INLINE __m128i to_bf16() const {  // round to nearest even
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  ML_INLINE __m128i to_fp16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  ML_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  ML_INLINE void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, to_bf16()); }
  ML_INLINE void store(fp16* p) const { _mm_storeu_si128((__m128i*)p, to_fp16()); }

  template <class T>
  ML_INLINE void store(T* p, int n) const {
    T whole[N];
    store(whole);
    std::memcpy(p, whole, size_t(n) * sizeof(T));
  }
};

ML_INLINE f32v operator+(f32v a, f32v b) { return _mm256_add_ps(a.v, b.v); }
ML_INLINE f32v operator-(f32v a, f32v b) { return _mm256_sub_ps(a.v, b.v); }
ML_INLINE f32v operator*(f32v a, f32v b) { return _mm256_mul_ps(a.v, b.v); }
ML_INLINE f32v operator/(f32v a, f32v b) { return _mm256_div_ps(a.v, b.v); }
ML_INLINE f32v fma(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
ML_INLINE f32v max(f32v a, f32v b) { return _mm256_max_ps(a.v, b.v); }
ML_INLINE f32v min(f32v a, f32v b) { return _mm256_min_ps(a.v, b.v); }
ML_INLINE f32v abs(f32v a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
ML_INLINE f32v sqrt(f32v a) { return _mm256_sqrt_ps(a.v); }

/// To the nearest integer, ties to even.
ML_INLINE f32v round(f32v a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/// 2^n for an integral n in [-126, 127].
ML_INLINE f32v pow2(f32v n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

/// Per lane: a < b ? yes : no.
ML_INLINE f32v select_less(f32v a, f32v b, f32v yes, f32v no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}

/// Per lane: x where x is NaN, else `other`.
ML_INLINE f32v select_unordered(f32v x, f32v other) {
  return _mm256_blendv_ps(other.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
}

/// Halves added until one lane is left: (0+4, 1+5 ...), then 2, 1 apart.
ML_INLINE float sum(f32v a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

ML_INLINE float max(f32v a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace ml::ML_ISA
