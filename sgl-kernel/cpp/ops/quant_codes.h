// A unit of codes (four k of 32 columns, see quant.h) as numbers. Included from .inc.cpp files only.
//
//   Codes::kBytes              of a unit
//   Codes::widen(unit, out)    out[4][32] float
//   Codes::pairs(unit, w)      fp8 on AVX-512: w[2 p + h] holds columns 16 h ... of k = 2 p, 2 p + 1 as pairs of bf16
#pragma once

#include "ops/quant.h"
#include "simd/vec.h"

namespace ml::ML_ISA {

/// The bits `mask` of each 32-bit lane from bit `shift` on, less `offset`.
ML_INLINE f32v field(const char* p, int shift, int mask, float offset) {
#if defined(ML_ISA_AVX512)
  const __m512i bits = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(mask))), _mm512_set1_ps(offset));
#elif defined(ML_ISA_AVX2)
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i bits = _mm256_srl_epi32(lanes, _mm_cvtsi32_si128(shift));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(mask))), _mm256_set1_ps(offset));
#else
  f32v value;
  for (int i = 0; i < f32v::N; ++i) {
    uint32_t lane;
    __builtin_memcpy(&lane, p + 4 * i, 4);
    value.v[i] = float(int(lane >> shift) & mask) - offset;
  }
  return value;
#endif
}

struct Int8Codes {
  static constexpr int64_t kBytes = 128;
  static constexpr int kOffset = 128;  // of the stored code

  static ML_INLINE void widen(const char* unit, float* out) {
    for (int k = 0; k < 4; ++k) {
      for (int c = 0; c < kPanel; c += f32v::N) field(unit + 4 * c, 8 * k, 255, kOffset).store(out + k * kPanel + c);
    }
  }
};

struct Int4Codes {
  static constexpr int64_t kBytes = 64;
  static constexpr int kOffset = 8;

  static ML_INLINE void widen(const char* unit, float* out) {
    for (int k = 0; k < 4; ++k) {
      for (int c = 0; c < 16; c += f32v::N) {
        field(unit + 4 * c, 8 * k, 15, kOffset).store(out + k * kPanel + c);
        field(unit + 4 * c, 8 * k + 4, 15, kOffset).store(out + k * kPanel + 16 + c);
      }
    }
  }
};

#if defined(ML_ISA_AVX512)
/// 32 fp8 as bf16. The exponent moves to its place and gets the other bias; numbers too small for a leading one
/// (exponent 0) come from a table of their fractions.
template <int fraction_bits>
ML_INLINE __m512i fp8_to_bf16(__m256i codes) {
  constexpr int shift = 7 - fraction_bits;
  constexpr int exponents = 0x7f >> fraction_bits << fraction_bits;
  constexpr int bias = fraction_bits == 3 ? 120 : 112;  // 127 - 7, 127 - 15
  // i * 2^-9 for e4m3, i * 2^-16 for e5m2; what lies beyond is not looked up.
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
