#include "ops/quant.h"

#include "ops/quant_codes.h"
#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

#if defined(ML_ISA_AVX512)
constexpr int kMostRows = 12;  // of a register tile
#elif defined(ML_ISA_AVX2)
constexpr int kMostRows = 4;
#else
constexpr int kMostRows = 2;
#endif

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
};

/// The sum of one segment of x in a prepared row.
template <class T>
ML_INLINE float segment_sum(const QuantLayout& q, const char* row, int64_t s) {
  float sum;
  __builtin_memcpy(&sum, row + q.padded_k * int64_t(sizeof(T)) + s * 4, sizeof(float));
  return sum;
}

/// out += scale * (sums - zero * sum of x), for kVectors vectors of one row.
template <class T>
ML_INLINE void add_segment(const Panel& p, int64_t s, const char* row, const f32v (&sums)[kVectors], int64_t column,
                           float* out) {
  const float* const scales = p.scales(s) + column;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    f32v sum = sums[v];
    if (p.q.zeros) {
      const f32v zero = f32v::load(scales + kPanel + v * f32v::N);
      sum = fma(zero, f32v::set(-segment_sum<T>(p.q, row, s)), sum);
    }
    float* const at = out + column + v * f32v::N;
    fma(f32v::load(scales + v * f32v::N), sum, f32v::load(at)).store(at);
  }
}

/// Calls run<rows>(...) for groups of nearly equal height.
template <template <int> class Run, int rows, class... Args>
ML_INLINE void with_rows(int64_t wanted, Args&&... args) {
  if constexpr (rows > 1) {
    if (wanted < rows) return with_rows<Run, rows - 1>(wanted, args...);
  }
  Run<rows>::run(args...);
}

/// One segment of x, float, times one segment of widened codes [k][32].
template <int rows>
struct FloatTile {
  static void run(const Panel& p, int64_t s, const float* codes, const char* x, int64_t ld, float* out) {
    const int64_t count = p.q.units(s) * kUnit;
    const char* const first = x + s * p.q.segment * int64_t(sizeof(float));
    for (int64_t column = 0; column < kPanel; column += kStripe) {
      f32v sums[rows][kVectors];
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < kVectors; ++v) sums[r][v] = f32v::zero();
      }
      for (int64_t k = 0; k < count; ++k) {
        f32v w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = f32v::load(codes + k * kPanel + column + v * f32v::N);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
          const f32v value = f32v::set(reinterpret_cast<const float*>(first + r * ld)[k]);
          for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
        }
      }
      for (int r = 0; r < rows; ++r) add_segment<float>(p, s, x + r * ld, sums[r], column, out + r * kPanel);
    }
  }
};

template <class Codes>
void float_rows(const Panel& p, PreparedRows x, int64_t rows, float* out) {
  alignas(64) float codes[kSegment * kPanel];
  const int64_t groups = (rows + kMostRows - 1) / kMostRows;
  for (int64_t s = 0; s < p.q.segments; ++s) {
    const char* const from = p.codes(s);
    for (int64_t u = 0; u < p.q.units(s); ++u) Codes::widen(from + u * Codes::kBytes, codes + u * kUnit * kPanel);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
      const char* const row = static_cast<const char*>(x.from_row(begin).data);
      with_rows<FloatTile, kMostRows>(end - begin, p, s, codes, row, x.ld_bytes, out + begin * kPanel);
    }
  }
}

#if defined(ML_ISA_AVX512)
/// A pair of bf16 in every lane.
ML_INLINE __m512bh pair_at(const char* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

/// `together` segments from s on of the same length, their codes unpacked in registers. For few rows: a single one has
/// only two chains per segment, and the adders need eight.
template <class Codes, int rows, int together>
void dot_segments(const Panel& p, int64_t s, const char* x, int64_t ld, float* out) {
  f32v sums[together][rows][kVectors];
  for (int t = 0; t < together; ++t) {
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[t][r][v] = f32v::zero();
    }
  }
  const int64_t units = p.q.units(s), step = p.q.segment_bytes, x_step = p.q.segment * 2;
  const int64_t ahead = together > 1 ? together * step : 2048;
  const char* from = p.codes(s);
  const char* at = x + s * x_step;
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
    for (int r = 0; r < rows; ++r) add_segment<bf16>(p, s + t, x + r * ld, sums[t][r], 0, out + r * kPanel);
  }
}

template <class Codes>
struct FewRows {
  template <int rows>
  struct Tile {
    static void run(const Panel& p, const char* x, int64_t ld, float* out) {
      constexpr int together = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
      const int64_t even = p.q.padded_k / p.q.segment;  // segments of full length
      int64_t s = 0;
      for (; s + together <= even; s += together) dot_segments<Codes, rows, together>(p, s, x, ld, out);
      for (; s < p.q.segments; ++s) dot_segments<Codes, rows, 1>(p, s, x, ld, out);
    }
  };
};

constexpr int64_t kFewRows = 6;

/// One segment of x times codes unpacked into memory: lines of two vectors per pair of k.
template <int rows>
struct DotTile {
  static void run(const Panel& p, int64_t s, const __m512i* codes, const char* x, int64_t ld, float* out) {
    f32v sums[rows][kVectors];
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = f32v::zero();
    }
    const char* at[4];  // every third row, so that twelve addresses need few registers
    for (int i = 0; i < 4; ++i) at[i] = x + s * p.q.segment * 2 + 3 * i * ld;
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
    for (int r = 0; r < rows; ++r) add_segment<bf16>(p, s, x + r * ld, sums[r], 0, out + r * kPanel);
  }
};

template <class Codes>
void dot_rows(const Panel& p, PreparedRows x, int64_t rows, float* out) {
  const char* const data = static_cast<const char*>(x.data);
  if (rows <= kFewRows) {
    return with_rows<FewRows<Codes>::template Tile, int(kFewRows)>(rows, p, data, x.ld_bytes, out);
  }
  __m512i codes[kSegment / 2 * kVectors];
  const int64_t groups = (rows + kMostRows - 1) / kMostRows;
  for (int64_t s = 0; s < p.q.segments; ++s) {
    const char* const from = p.codes(s);
    for (int64_t u = 0; u < p.q.units(s); ++u) {
      __m512i w[4];
      Codes::pairs(from + u * Codes::kBytes, w);
      for (int i = 0; i < 4; ++i) _mm512_store_si512(codes + 4 * u + i, w[i]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
      const char* const row = data + begin * x.ld_bytes;
      with_rows<DotTile, kMostRows>(end - begin, p, s, codes, row, x.ld_bytes, out + begin * kPanel);
    }
  }
}
#endif

template <class Codes>
void tile(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  const Panel p{quant_layout(w), w.panel(panel)};
  for (int64_t i = 0; i < rows * kPanel; i += f32v::N) f32v::zero().store(out + i);
#if defined(ML_ISA_AVX512)
  if (x.type == DType::bf16) return dot_rows<Codes>(p, x, rows, out);
#endif
  float_rows<Codes>(p, x, rows, out);
}

/// What rows of `x_type` are multiplied as.
ML_INLINE DType working_type(DType x_type) {
#if defined(ML_ISA_AVX512)
  return x_type == DType::bf16 ? DType::bf16 : DType::f32;
#else
  (void)x_type;
  return DType::f32;
#endif
}

int64_t prepared_row(const QuantLayout& q, DType type) {
  return q.padded_k * bytes_of(type) + (q.zeros ? q.segments * 4 : 0);
}

int64_t prepared_bytes(const PackedWeight& w, DType x_type) {
  const QuantLayout& q = quant_layout(w);
  const DType type = working_type(x_type);
  if (type == x_type && q.padded_k == w.k && !q.zeros && q.order.empty()) return 0;
  return prepared_row(q, type);
}

/// Elements of x in the order of the codes, zero-filled to padded_k.
template <class From, class To>
void gather(const QuantLayout& q, int64_t k, const From* x, To* out) {
  const int32_t* const order = q.order.empty() ? nullptr : q.order.data();
  for (int64_t i = 0; i < k; ++i) {
    if constexpr (sizeof(From) == sizeof(To)) {
      out[i] = x[order == nullptr ? i : order[i]];
    } else {
      out[i] = to_f32(x[order == nullptr ? i : order[i]]);
    }
  }
  for (int64_t i = k; i < q.padded_k; ++i) from_f32(0.0f, out + i);
}

template <class T>
void add_sums(const QuantLayout& q, char* row) {
  const T* const x = reinterpret_cast<const T*>(row);
  for (int64_t s = 0; s < q.segments; ++s) {
    const int64_t count = q.units(s) * kUnit;
    f32v lanes = f32v::zero();
    for (int64_t i = 0; i < count; i += f32v::N) {
      lanes += f32v::load(x + s * q.segment + i, count - i < f32v::N ? int(count - i) : f32v::N);
    }
    const float total = sum(lanes);
    __builtin_memcpy(row + q.padded_k * int64_t(sizeof(T)) + s * 4, &total, sizeof(float));
  }
}

template <class From, class To>
void prepare_as(const PackedWeight& w, PreparedRows x, int64_t rows, char* out, int64_t ld) {
  const QuantLayout& q = quant_layout(w);
  for (int64_t r = 0; r < rows; ++r) {
    char* const row = out + r * ld;
    gather(q, w.k, static_cast<const From*>(x.from_row(r).data), reinterpret_cast<To*>(row));
    if (q.zeros) add_sums<To>(q, row);
  }
}

PreparedRows prepare(const PackedWeight& w, PreparedRows x, int64_t rows, void* out) {
  const DType type = working_type(x.type);
  const PreparedRows done{out, type, prepared_row(quant_layout(w), type)};
  char* const to = static_cast<char*>(out);
  if (x.type == DType::f32) {
    prepare_as<float, float>(w, x, rows, to, done.ld_bytes);
  } else if (x.type == DType::f16) {
    prepare_as<fp16, float>(w, x, rows, to, done.ld_bytes);
  } else if (type == DType::bf16) {
    prepare_as<bf16, bf16>(w, x, rows, to, done.ld_bytes);
  } else {
    prepare_as<bf16, float>(w, x, rows, to, done.ld_bytes);
  }
  return done;
}

}  // namespace

const TileOps quant_int8_table = {prepared_bytes, prepare, tile<Int8Codes>};
const TileOps quant_int4_table = {prepared_bytes, prepare, tile<Int4Codes>};
const TileOps quant_e4m3_table = {prepared_bytes, prepare, tile<E4m3Codes>};
const TileOps quant_e5m2_table = {prepared_bytes, prepare, tile<E5m2Codes>};

}  // namespace ml::ML_ISA
