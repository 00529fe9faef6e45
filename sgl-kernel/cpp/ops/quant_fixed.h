// int8 and int4 weights times 16-bit rows, for AVX-512 with VNNI. Included from .inc.cpp files only.
//
// Turning codes into bf16 takes more instructions than multiplying them, and at one row that is slower than memory. So
// the rows are brought to the codes: each chunk of a bf16 or f16 row becomes whole numbers X times a power of two,
// and X two signed digits, X = 256 high + low, which vpdpbusd multiplies by the unsigned codes: as many instructions
// per product as the bf16 dot product needs, and the sums are exact. The largest X of a chunk has 15 bits: bf16
// elements down to 1/128 of it are kept as they are, smaller ones are rounded to multiples of at most 2^-14 of it.
//
// A prepared row: per unit four high digits and four low ones; then per chunk its power of two and the sum of its X.
#pragma once

#include "ops/quant_codes.h"
#include "ops/quant_panel.h"

namespace ml::ML_ISA {

// How far ahead the codes are asked for. Memory takes 100 ns and more: less would hold a core to 20 GB/s.
constexpr int64_t kAhead = 4096;

/// The power of two by which a chunk with this largest element is divided: that becomes 2^14 ... 32637, so that its
/// high digit stays below 128. 0 for a chunk of zeros, and of numbers too small to matter.
ML_INLINE float unit_of(float largest) {
  const float power = bit_cast<float>(bit_cast<uint32_t>(largest * 1.004f) & 0x7f800000u);
  return power < 1e-30f ? 0.0f : power * (1.0f / 16384.0f);
}

ML_INLINE int64_t fixed_row_bytes(const QuantLayout& q) { return q.padded_k * 2 + q.chunks * 8; }

/// The 16 elements of x from i on (zeros beyond k), in the order of the codes.
template <class T>
ML_INLINE f32v elements(const QuantLayout& q, const T* x, int64_t k, int64_t i) {
  const int64_t count = k - i < f32v::N ? (k > i ? k - i : 0) : f32v::N;
  if (q.order.empty()) return count == f32v::N ? f32v::load(x + i) : f32v::load(x + i, int(count));
  T gathered[f32v::N] = {};
  for (int64_t j = 0; j < count; ++j) gathered[j] = x[q.order.data()[i + j]];
  return f32v::load(gathered);
}

/// One row; see above. NaN and infinities make the power of their chunk NaN.
template <class T>
void fix_row(const QuantLayout& q, const T* x, int64_t k, char* out) {
  for (int64_t s = 0; s < q.chunks; ++s) {
    const int64_t begin = q.begin(s), end = begin + q.units(s) * kUnit;
    f32v largest = f32v::zero(), poison = f32v::zero();
    for (int64_t i = begin; i < end; i += f32v::N) {
      f32v value = elements(q, x, k, i);
      if (end - i < f32v::N) value.v = _mm512_maskz_mov_ps(f32v::first(int(end - i)), value.v);
      largest = max(largest, abs(value));
      poison = fma(value, f32v::zero(), poison);
    }
    const float power = unit_of(max(largest));
    const f32v inverse = f32v::set(power > 0.0f ? 1.0f / power : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += f32v::N) {
      const int left = end - i < f32v::N ? int(end - i) : f32v::N;
      const __m512i whole = _mm512_maskz_cvtps_epi32(f32v::first(left), (elements(q, x, k, i) * inverse).v);
      sum = _mm512_add_epi32(sum, whole);
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      const __m128i highs = _mm512_cvtepi32_epi8(high), lows = _mm512_cvtepi32_epi8(whole);
      const __m128i first = _mm_unpacklo_epi32(highs, lows), second = _mm_unpackhi_epi32(highs, lows);
      const __m256i digits = _mm256_set_m128i(second, first);
      _mm256_mask_storeu_epi32(out + i * 2, __mmask8((1u << (left / 2)) - 1u), digits);
    }
    const float nothing = ml::ML_ISA::sum(poison);  // or NaN; the whole numbers mean nothing then, and may overflow
    const float scale = power + nothing;
    const int32_t total = nothing == 0.0f ? _mm512_reduce_add_epi32(sum) : 0;
    __builtin_memcpy(out + q.padded_k * 2 + s * 8, &scale, 4);
    __builtin_memcpy(out + q.padded_k * 2 + s * 8 + 4, &total, 4);
  }
}

/// The codes of a unit, unsigned; what w[1] is multiplied by beyond its value is kTimes.
template <class Codes>
struct Unsigned;

template <>
struct Unsigned<Int8Codes> {
  static constexpr int kTimes = 1;
  static ML_INLINE void load(const char* unit, __m512i (&w)[2]) {
    w[0] = _mm512_loadu_si512(unit);
    w[1] = _mm512_loadu_si512(unit + 64);
  }
};

template <>
struct Unsigned<Int4Codes> {
  static constexpr int kTimes = 16;  // the upper halves of the bytes stay where they are
  static ML_INLINE void load(const char* unit, __m512i (&w)[2]) {
    const __m512i both = _mm512_loadu_si512(unit), low = _mm512_set1_epi8(15);
    w[0] = _mm512_and_si512(both, low);
    w[1] = _mm512_andnot_si512(low, both);
  }
};

/// out += scale of the codes * scale of the row * (sums - (offset + zero) * sum of X). All sums fit in 32 bits.
template <class Codes>
ML_INLINE void add_fixed(const Panel& p, int64_t s, const char* row, const __m512i (&high)[2], const __m512i (&low)[2],
                         float* out) {
  float scale;
  int32_t total;
  __builtin_memcpy(&scale, row + p.q.padded_k * 2 + s * 8, 4);
  __builtin_memcpy(&total, row + p.q.padded_k * 2 + s * 8 + 4, 4);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[v], 8), low[v]);
    if (v == 1 && Unsigned<Codes>::kTimes == 16) sum = _mm512_srai_epi32(sum, 4);
    __m512i excess = _mm512_set1_epi32(int32_t(uint32_t(total) * uint32_t(Codes::kOffset)));
    if (p.q.zeros) {
      const __m512i zero = _mm512_cvtps_epi32(f32v::load(p.zeros(s) + v * 16).v);
      excess = _mm512_add_epi32(excess, _mm512_mullo_epi32(zero, _mm512_set1_epi32(total)));
    }
    const f32v exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, excess));
    float* const at = out + v * 16;
    fma(f32v::load(p.scales(s) + v * 16) * f32v::set(scale), exact, f32v::load(at)).store(at);
  }
}

/// rows x 32 columns. A row needs four sums per column pair of vectors; with few rows two sets of them alternate, since
/// the order of whole numbers is free and an addition takes longer than the codes take to arrive.
template <class Codes>
struct Fixed {
  template <int rows>
  struct Tile {
    static void run(const Panel& p, const char* x, int64_t ld, float* out) {
      constexpr int sets = rows <= 2 ? 2 : 1;
      const char* base[2] = {x, x + 3 * ld};  // every third row, so that six addresses need few registers
      for (int64_t s = 0; s < p.q.chunks; ++s) {
        __m512i high[sets][rows][2], low[sets][rows][2];
#pragma GCC unroll 2
        for (int i = 0; i < sets; ++i) clear<rows>(high[i], low[i]);
        const int64_t units = p.q.units(s), even = units / sets * sets;
        const char* unit = p.codes(s);
        int64_t at = p.q.begin(s) * 2;
        int64_t u = 0;
        for (; u < even; u += sets) {
#pragma GCC unroll 2
          for (int i = 0; i < sets; ++i, unit += Codes::kBytes, at += 8) {
            add_unit<rows>(unit, base, ld, at, high[i], low[i]);
          }
        }
        for (; u < units; ++u, unit += Codes::kBytes, at += 8) add_unit<rows>(unit, base, ld, at, high[0], low[0]);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          if constexpr (sets == 2) {
            join(high[0][r], high[1][r]);
            join(low[0][r], low[1][r]);
          }
          add_fixed<Codes>(p, s, x + r * ld, high[0][r], low[0][r], out + r * kPanel);
        }
      }
    }
  };

  template <int rows>
  static ML_INLINE void clear(__m512i (&high)[rows][2], __m512i (&low)[rows][2]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
  }

  static ML_INLINE void join(__m512i (&sums)[2], const __m512i (&more)[2]) {
    sums[0] = _mm512_add_epi32(sums[0], more[0]);
    sums[1] = _mm512_add_epi32(sums[1], more[1]);
  }

  template <int rows>
  static ML_INLINE void add_unit(const char* unit, const char* const (&base)[2], int64_t ld, int64_t at,
                                 __m512i (&high)[rows][2], __m512i (&low)[rows][2]) {
    __builtin_prefetch(unit + kAhead);
    if (Codes::kBytes > 64) __builtin_prefetch(unit + kAhead + 64);
    __m512i w[2];
    Unsigned<Codes>::load(unit, w);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const char* const row = base[r / 3] + (r % 3) * ld + at;
      const __m512i highs = four_in_all(row), lows = four_in_all(row + 4);
      add_products(high[r][0], w[0], highs);
      add_products(high[r][1], w[1], highs);
      add_products(low[r][0], w[0], lows);
      add_products(low[r][1], w[1], lows);
    }
  }
};

constexpr int kFixedRows = 6;  // 24 sums, 2 codes, 2 digits of 32 registers

template <class Codes>
void fixed_rows(const Panel& p, PreparedRows x, int64_t rows, float* out) {
  const int64_t groups = (rows + kFixedRows - 1) / kFixedRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
    const char* const row = static_cast<const char*>(x.data) + begin * x.ld_bytes;
    with_rows<Fixed<Codes>::template Tile, kFixedRows>(end - begin, p, row, x.ld_bytes, out + begin * kPanel);
  }
}

}  // namespace ml::ML_ISA
