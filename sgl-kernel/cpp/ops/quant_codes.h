// A unit of codes (four k of 32 columns, see quant.h) as numbers in registers. Included from .inc.cpp files only.
//
//   Codes::kBytes              of a unit
//   Codes::widen(unit, out)    out[4][32] float
//   Codes::pairs(unit, w)      AVX-512: w[2 p + h] holds columns 16 h ... of k = 2 p, 2 p + 1 as pairs of bf16
#pragma once

#include "ops/quant.h"
#include "simd/vec.h"

namespace ml::ML_ISA {

#if defined(ML_ISA_AVX512)
/// The upper halves of two vectors of floats that bf16 can hold: pairs of (even, odd).
ML_INLINE __m512i interleave_bf16(__m512 even, __m512 odd) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_mask_mov_epi16(high, 0xaaaaaaaau, _mm512_castps_si512(odd));
}
#endif

struct Int8Codes {
  static constexpr int64_t kBytes = 128;

  static ML_INLINE void widen(const char* unit, float* out) {
    const int8_t* const codes = reinterpret_cast<const int8_t*>(unit);
    for (int i = 0; i < 128; i += f32v::N) f32v::load(codes + i).store(out + i);
  }

#if defined(ML_ISA_AVX512)
  static ML_INLINE void pairs(const char* unit, __m512i (&w)[4]) {
    const int8_t* const codes = reinterpret_cast<const int8_t*>(unit);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int8_t* const even = codes + i / 2 * 64 + i % 2 * 16;
      w[i] = interleave_bf16(f32v::load(even).v, f32v::load(even + 32).v);
    }
  }
#endif
};

/// Four bits of each of N 32-bit lanes from `shift` on, less 8.
ML_INLINE f32v nibbles(const uint32_t* p, int shift) {
#if defined(ML_ISA_AVX512)
  const __m512i bits = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(15))), _mm512_set1_ps(8.0f));
#elif defined(ML_ISA_AVX2)
  const __m256i bits =
      _mm256_srl_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm_cvtsi32_si128(shift));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(15))), _mm256_set1_ps(8.0f));
#else
  f32v value;
  for (int i = 0; i < f32v::N; ++i) value.v[i] = float(p[i] >> shift & 15u) - 8.0f;
  return value;
#endif
}

struct Int4Codes {
  static constexpr int64_t kBytes = 64;

  static ML_INLINE void widen(const char* unit, float* out) {
    const uint32_t* const lanes = reinterpret_cast<const uint32_t*>(unit);
    for (int k = 0; k < 4; ++k) {
      for (int half = 0; half < 2; ++half) {
        const int shift = 16 * (k % 2) + 8 * (k / 2) + 4 * half;
        for (int c = 0; c < 16; c += f32v::N) nibbles(lanes + c, shift).store(out + k * kPanel + 16 * half + c);
      }
    }
  }

#if defined(ML_ISA_AVX512)
  static ML_INLINE void pairs(const char* unit, __m512i (&w)[4]) {
    // A look-up takes five bits as its index; the upper half of the table repeats the lower, so the fifth does not
    // count.
    alignas(64) static constexpr uint16_t kValues[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i values = _mm512_load_si512(kValues);
    const __m512i codes = _mm512_loadu_si512(unit);
    w[0] = _mm512_permutexvar_epi16(codes, values);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), values);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), values);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), values);
  }
#endif
};

#if defined(ML_ISA_AVX512)
/// 32 fp8 as bf16. The exponent moves to its place and gets the other bias; numbers too small for a leading one
/// (exponent 0) come from a table of their fractions.
template <int fraction_bits>
ML_INLINE __m512i fp8_to_bf16(__m256i codes) {
  constexpr int shift = 7 - fraction_bits;
  constexpr int exponents = 0x7f >> fraction_bits << fraction_bits;
  constexpr int bias = fraction_bits == 3 ? 120 : 112;  // 127 - 7, 127 - 15
  // k * 2^-9 for e4m3, k * 2^-16 for e5m2, k = 0..7; what lies beyond is not looked up.
  alignas(64) static constexpr uint16_t kE4m3[32] = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  alignas(64) static constexpr uint16_t kE5m2[32] = {0x0000, 0x3780, 0x3800, 0x3840};
  const __m512i wide = _mm512_cvtepi8_epi16(codes);
  const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(wide, shift), _mm512_set1_epi16(short(0x7f << shift)));
  const __m512i normal = _mm512_add_epi16(moved, _mm512_set1_epi16(short(bias << 7)));
  const __mmask32 small = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(short(exponents)));
  const __m512i table = _mm512_load_si512(fraction_bits == 3 ? kE4m3 : kE5m2);
  const __m512i magnitude = _mm512_mask_permutexvar_epi16(normal, small, wide, table);
  // magnitude | (wide & sign)
  return _mm512_ternarylogic_epi32(magnitude, wide, _mm512_set1_epi16(short(0x8000)), 0xf8);
}
#endif

template <class T, int fraction_bits>
struct Fp8Codes {
  static constexpr int64_t kBytes = 128;

  static ML_INLINE void widen(const char* unit, float* out) {
    uint8_t apart[128];  // [4][32]
    for (int pair = 0; pair < 2; ++pair) {
      for (int c = 0; c < kPanel; ++c) {
        apart[pair * 64 + c] = uint8_t(unit[pair * 64 + 2 * c]);
        apart[pair * 64 + 32 + c] = uint8_t(unit[pair * 64 + 2 * c + 1]);
      }
    }
    const T* const codes = reinterpret_cast<const T*>(apart);
    for (int i = 0; i < 128; i += f32v::N) f32v::load(codes + i).store(out + i);
  }

#if defined(ML_ISA_AVX512)
  static ML_INLINE void pairs(const char* unit, __m512i (&w)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[i] = fp8_to_bf16<fraction_bits>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + i * 32)));
    }
  }
#endif
};

using E4m3Codes = Fp8Codes<fp8_e4m3, 3>;
using E5m2Codes = Fp8Codes<fp8_e5m2, 2>;

}  // namespace ml::ML_ISA
