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
/// The upper and the lower byte of the bf16 of every fp8 magnitude.
struct Fp8Table {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];
};

template <int fraction_bits>
constexpr Fp8Table fp8_table() {
  constexpr int bias = fraction_bits == 3 ? 7 : 15;
  Fp8Table table{};
  for (int code = 1; code < 128; ++code) {
    int exponent = code >> fraction_bits, fraction = code & ((1 << fraction_bits) - 1);
    if (exponent == 0) {  // no leading one: bring it up
      exponent = 1;
      for (; fraction >> fraction_bits == 0; fraction <<= 1) --exponent;
      fraction -= 1 << fraction_bits;
    }
    const int bits = (exponent - bias + 127) << 7 | fraction << (7 - fraction_bits);
    table.high[code] = uint8_t(bits >> 8);
    table.low[code] = uint8_t(bits);
  }
  return table;
}

template <int fraction_bits>
constexpr Fp8Table kFp8 = fp8_table<fraction_bits>();

/// `of` the bytes of `codes` without their signs.
ML_INLINE __m512i look_up(__m512i codes, const uint8_t (&of)[128]) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(of), codes, _mm512_load_si512(of + 64));
}
#endif

/// The column whose pair of k is the i-th of 32: such that interleaving bytes within 16 leaves the columns in order.
constexpr int fp8_column(int i) { return i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : 16); }

template <class T, int fraction_bits>
struct Fp8Codes {
  static constexpr int64_t kBytes = 128;

  static ML_INLINE void widen(const char* unit, float* out) {
    uint8_t apart[128];  // [4][32]
    for (int pair = 0; pair < 2; ++pair) {
      for (int i = 0; i < kPanel; ++i) {
        apart[pair * 64 + fp8_column(i)] = uint8_t(unit[pair * 64 + 2 * i]);
        apart[pair * 64 + 32 + fp8_column(i)] = uint8_t(unit[pair * 64 + 2 * i + 1]);
      }
    }
    const T* const codes = reinterpret_cast<const T*>(apart);
    for (int i = 0; i < 128; i += f32v::N) f32v::load(codes + i).store(out + i);
  }

#if defined(ML_ISA_AVX512)
  static ML_INLINE void pairs(const char* unit, __m512i (&w)[4]) {
    const Fp8Table& table = kFp8<fraction_bits>;
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const __m512i codes = _mm512_loadu_si512(unit + 64 * p), low = look_up(codes, table.low);
      // the magnitude's upper byte | the code's sign
      const __m512i high =
          _mm512_ternarylogic_epi32(look_up(codes, table.high), codes, _mm512_set1_epi8(char(0x80)), 0xf8);
      w[2 * p] = _mm512_unpacklo_epi8(low, high);
      w[2 * p + 1] = _mm512_unpackhi_epi8(low, high);
    }
  }
#endif
};

using E4m3Codes = Fp8Codes<fp8_e4m3, 3>;
using E5m2Codes = Fp8Codes<fp8_e5m2, 2>;

}  // namespace ml::ML_ISA
