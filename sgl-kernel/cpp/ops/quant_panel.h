// What the kernels of quantised weights share. Included from .inc.cpp files only.
#pragma once

#include "ops/quant.h"
#include "simd/vec.h"

namespace ml::ML_ISA {

constexpr int kVectors = 2;
constexpr int kStripe = kVectors * f32v::N;  // columns that one register tile computes

/// Where things are in a panel.
struct Panel {
  const QuantLayout& q;
  const char* data;

  ML_INLINE const char* codes(int64_t s) const { return data + q.head_bytes + s * q.segment_bytes + q.side_bytes; }
  ML_INLINE const float* scales(int64_t s) const {
    return reinterpret_cast<const float*>(q.side_bytes > 0 ? data + q.head_bytes + s * q.segment_bytes : data);
  }
  ML_INLINE const float* zeros(int64_t s) const { return scales(s) + kPanel; }
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
ML_INLINE void add_segment(const Panel& p, int64_t s, float sum_of_x, const f32v (&sums)[kVectors], int64_t column,
                           float* out) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = column + v * f32v::N;
    f32v sum = sums[v];
    if (p.q.zeros) sum = fma(f32v::load(p.zeros(s) + c), f32v::set(-sum_of_x), sum);
    fma(f32v::load(p.scales(s) + c), sum, f32v::load(out + c)).store(out + c);
  }
}

}  // namespace ml::ML_ISA
