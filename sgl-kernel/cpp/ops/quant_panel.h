// What the kernels of quantised weights share. Included from .inc.cpp files only.
#pragma once

#include "ops/quant.h"
#include "simd/vec.h"

namespace ml::ML_ISA {

constexpr int kVectors = 2;
constexpr int kStripe = kVectors * f32v::N;  // columns that one register tile computes

/// Where things are in a panel, or in one segment of it.
struct Panel {
  const QuantLayout& q;
  const char* data;

  ML_INLINE const char* codes(int64_t c) const { return data + q.offset(c) + q.side_bytes; }
  ML_INLINE const float* scales(int64_t c) const {
    return reinterpret_cast<const float*>(q.side_bytes > 0 ? data + q.offset(c) : data);
  }
  ML_INLINE const float* zeros(int64_t c) const { return scales(c) + kPanel; }
};

#if defined(ML_ISA_AVX512)
/// sums += four unsigned codes times four signed ones per lane. The intrinsic would do; but GCC 12 keeps a copy of
/// every sum for it, which costs as much as the product.
ML_INLINE void add_products(__m512i& sums, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
}

/// Four bytes in every lane.
ML_INLINE __m512i four_in_all(const char* p) {
  int four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
#endif

/// Calls Run<rows>::run(...) for `wanted` rows.
template <template <int> class Run, int rows, class... Args>
ML_INLINE void with_rows(int64_t wanted, Args&&... args) {
  if constexpr (rows > 1) {
    if (wanted < rows) return with_rows<Run, rows - 1>(wanted, args...);
  }
  Run<rows>::run(args...);
}

/// out += scale * (sums - zero * sum_of_x), for one row and kVectors vectors of columns.
ML_INLINE void add_chunk(const Panel& p, int64_t s, float sum_of_x, const f32v (&sums)[kVectors], int64_t column,
                           float* out) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = column + v * f32v::N;
    f32v sum = sums[v];
    if (p.q.zeros) sum = fma(f32v::load(p.zeros(s) + c), f32v::set(-sum_of_x), sum);
    fma(f32v::load(p.scales(s) + c), sum, f32v::load(out + c)).store(out + c);
  }
}

/// tile(one segment of the panel, its part of the rows, out) for each segment, added up as a tree. A sum waits at its
/// level for its right neighbour, as in gemm.inc.cpp. row_bytes(segment): of a prepared row.
template <class RowBytes, class Tile>
ML_INLINE void in_segments(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out,
                           RowBytes row_bytes, Tile tile) {
  const QuantSegments& segments = quant_segments(w);
  const int64_t count = int64_t(segments.size());
  if (count == 1) return tile(Panel{segments[0], w.panel(panel)}, x, out);
  constexpr int kLevels = 3;
  static_assert(kMostSegments == 1 << kLevels);
  alignas(64) float waiting[kLevels][kTileRows * kPanel];
  for (int64_t s = 0; s < count; ++s) {
    const QuantLayout& q = segments[size_t(s)];
    const int level = __builtin_ctzll(~uint64_t(s));  // so many neighbours on the left wait for this one
    float* const sums = s + 1 == count ? out : waiting[level];
    tile(Panel{q, w.panel(panel) + q.panel_offset}, x, sums);
    for (int i = 0; i < level; ++i) {
      for (int64_t at = 0; at < rows * kPanel; at += f32v::N) {
        (f32v::load(waiting[i] + at) + f32v::load(sums + at)).store(sums + at);
      }
    }
    x.data = static_cast<const char*>(x.data) + row_bytes(q);
  }
}

/// Bytes of a prepared row of all segments.
template <class RowBytes>
ML_INLINE int64_t sum_of(const PackedWeight& w, RowBytes row_bytes) {
  int64_t bytes = 0;
  for (const QuantLayout& q : quant_segments(w)) bytes += row_bytes(q);
  return bytes;
}

}  // namespace ml::ML_ISA
