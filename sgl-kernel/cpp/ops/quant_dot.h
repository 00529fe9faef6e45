// fp8 weights times bf16 rows by the bf16 dot product, for AVX-512. Included from .inc.cpp files only.
#pragma once

#include "ops/quant_codes.h"
#include "ops/quant_panel.h"

namespace ml::ML_ISA {

/// The sum of chunk s of a prepared row of bf16 or float; kept only if there are zero points.
template <class T>
ML_INLINE float chunk_sum(const QuantLayout& q, const char* row, int64_t s) {
  if (!q.zeros) return 0.0f;
  float sum;
  __builtin_memcpy(&sum, row + q.padded_k * int64_t(sizeof(T)) + s * 4, sizeof(float));
  return sum;
}

#if defined(ML_ISA_AVX512)
/// A pair of bf16 in every lane.
ML_INLINE __m512bh pair_at(const char* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

/// `together` chunks from s on of the same length, their codes unpacked in registers. For few rows: a single one has
/// only two chains per chunk, and the adders need eight.
template <class Codes, int rows, int together>
void dot_chunks(const Panel& p, int64_t s, const char* x, int64_t ld, float* out) {
  f32v sums[together][rows][kVectors];
#pragma GCC unroll 4
  for (int t = 0; t < together; ++t) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) sums[t][r][0] = sums[t][r][1] = f32v::zero();
  }
  const int64_t units = p.q.units(s), step = p.q.chunk_bytes, x_step = p.q.chunk * 2;
  const int64_t ahead = together > 1 ? together * step : 2048;
  const char* from = p.codes(s);
  const char* at = x + p.q.begin(s) * 2;
  for (int64_t u = 0; u < units; ++u, from += Codes::kBytes, at += kUnit * 2) {
#pragma GCC unroll 4
    for (int t = 0; t < together; ++t) {
      __m512i w[4];
      Codes::pairs(from + t * step, w);
      __builtin_prefetch(from + t * step + ahead);
      if (Codes::kBytes > 64) __builtin_prefetch(from + t * step + ahead + 64);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const char* const row = at + t * x_step + r * ld;
        const __m512bh x0 = pair_at(row), x1 = pair_at(row + 4);
        sums[t][r][0].v = _mm512_dpbf16_ps(sums[t][r][0].v, (__m512bh)w[0], x0);
        sums[t][r][1].v = _mm512_dpbf16_ps(sums[t][r][1].v, (__m512bh)w[1], x0);
        sums[t][r][0].v = _mm512_dpbf16_ps(sums[t][r][0].v, (__m512bh)w[2], x1);
        sums[t][r][1].v = _mm512_dpbf16_ps(sums[t][r][1].v, (__m512bh)w[3], x1);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < together; ++t) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
      add_chunk(p, s + t, chunk_sum<bf16>(p.q, x + r * ld, s + t), sums[t][r], 0, out + r * kPanel);
  }
}

template <class Codes>
struct FewRows {
  template <int rows>
  struct Tile {
    static void run(const Panel& p, const char* x, int64_t ld, float* out) {
      constexpr int together = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
      const int64_t even = (p.q.padded_k + p.q.lead) / p.q.chunk;  // chunks that end where a full one does
      int64_t s = 0;
      if (p.q.lead > 0) dot_chunks<Codes, rows, 1>(p, s++, x, ld, out);
      for (; s + together <= even; s += together) dot_chunks<Codes, rows, together>(p, s, x, ld, out);
      for (; s < p.q.chunks; ++s) dot_chunks<Codes, rows, 1>(p, s, x, ld, out);
    }
  };
};

constexpr int64_t kFewRows = 6;
constexpr int kDotRows = 12;  // 24 sums, 2 weights, 1 pair of 32 registers

/// One chunk of x times codes unpacked into memory: lines of two vectors per pair of k.
template <int rows>
struct DotTile {
  static void run(const Panel& p, int64_t s, const __m512i* codes, const char* x, int64_t ld, float* out) {
    f32v sums[rows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = f32v::zero();
    const char* at[4];  // every third row, so that twelve addresses need few registers
    for (int i = 0; i < 4; ++i) at[i] = x + p.q.begin(s) * 2 + 3 * i * ld;
    const int64_t pairs = p.q.units(s) * (kUnit / 2);
    for (int64_t i = 0; i < pairs; ++i) {
      const __m512bh w0 = (__m512bh)_mm512_load_si512(codes + 2 * i),
                     w1 = (__m512bh)_mm512_load_si512(codes + 2 * i + 1);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const __m512bh pair = pair_at(at[r / 3] + (r % 3) * ld + i * 4);
        sums[r][0].v = _mm512_dpbf16_ps(sums[r][0].v, w0, pair);
        sums[r][1].v = _mm512_dpbf16_ps(sums[r][1].v, w1, pair);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
      add_chunk(p, s, chunk_sum<bf16>(p.q, x + r * ld, s), sums[r], 0, out + r * kPanel);
  }
};

template <class Codes>
void dot_rows(const Panel& p, PreparedRows x, int64_t rows, float* out) {
  const char* const data = static_cast<const char*>(x.data);
  if (rows <= kFewRows) {
    return with_rows<FewRows<Codes>::template Tile, int(kFewRows)>(rows, p, data, x.ld_bytes, out);
  }
  __m512i codes[kChunk / 2 * kVectors];
  const int64_t groups = (rows + kDotRows - 1) / kDotRows;
  for (int64_t s = 0; s < p.q.chunks; ++s) {
    const char* const from = p.codes(s);
    for (int64_t u = 0; u < p.q.units(s); ++u) {
      __m512i w[4];
      Codes::pairs(from + u * Codes::kBytes, w);
      for (int i = 0; i < 4; ++i) _mm512_store_si512(codes + 4 * u + i, w[i]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
      const char* const row = data + begin * x.ld_bytes;
      with_rows<DotTile, kDotRows>(end - begin, p, s, codes, row, x.ld_bytes, out + begin * kPanel);
    }
  }
}
#endif

}  // namespace ml::ML_ISA
