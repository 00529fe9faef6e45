// int8 weights times activations that are quantised to int8 row by row. All sums are whole numbers, the same
// everywhere.
#include "ops/quant.h"
#include "ops/quant_panel.h"
#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

#if defined(ML_ISA_AVX512)
constexpr int kMostRows = 12;
constexpr int kShift = 128;  // the instruction multiplies unsigned by signed: x goes in as x + 128
#elif defined(ML_ISA_AVX2)
constexpr int kMostRows = 4;
constexpr int kShift = 0;
#else
constexpr int kMostRows = 1;
constexpr int kShift = 0;
#endif

constexpr int kLanes = f32v::N;

// Sums: one per lane. Codes: of a weight, four per lane. Four: codes of x. add_four: sums += their products.
#if defined(ML_ISA_AVX512)
using Sums = __m512i;
using Codes = __m512i;
using Four = __m512i;
ML_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
ML_INLINE Codes load_codes(const char* p) { return _mm512_loadu_si512(p); }
ML_INLINE Four load_four(const char* p) { return four_in_all(p); }
ML_INLINE void add_four(Sums& sums, Codes w, Four x) { add_products(sums, x, w); }
ML_INLINE f32v finished(Sums sums, const int32_t* code_sums) {
  const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(code_sums), 7);  // 128 times
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, excess));
}
#elif defined(ML_ISA_AVX2)
using Sums = __m256i;
using Codes = __m256i;
using Four = __m256i;
ML_INLINE Sums no_sums() { return _mm256_setzero_si256(); }
ML_INLINE Codes load_codes(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ML_INLINE Four load_four(const char* p) {
  int four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
ML_INLINE void add_four(Sums& sums, Codes w, Four x) {
  // |x| * (w with the sign of x): two products of at most 127^2 fit in 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
ML_INLINE f32v finished(Sums sums, const int32_t*) { return _mm256_cvtepi32_ps(sums); }
#else
struct Sums {
  int32_t v[kLanes];
};
using Codes = const char*;
using Four = const char*;
ML_INLINE Sums no_sums() { return {}; }
ML_INLINE Codes load_codes(const char* p) { return p; }
ML_INLINE Four load_four(const char* p) { return p; }
ML_INLINE void add_four(Sums& sums, Codes w, Four x) {
  for (int i = 0; i < kLanes; ++i) {
    for (int k = 0; k < 4; ++k) sums.v[i] += int32_t(int8_t(w[4 * i + k])) * int32_t(int8_t(x[k]));
  }
}
ML_INLINE f32v finished(const Sums& sums, const int32_t*) {
  f32v value;
  for (int i = 0; i < kLanes; ++i) value.v[i] = float(sums.v[i]);
  return value;
}
#endif

/// A panel: scales, sums of codes, codes. A prepared row: codes, then the scale.
template <int rows>
void run_rows(const char* panel, const char* x, int64_t ld, int64_t padded_k, float* out) {
  const float* const scales = reinterpret_cast<const float*>(panel);
  const int32_t* const code_sums = reinterpret_cast<const int32_t*>(panel + kScaleBytes);
  for (int64_t column = 0; column < kPanel; column += kStripe) {
    Sums sums[rows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = no_sums();
    }
    const char* at[4];  // every third row, so that twelve addresses need few registers
    for (int i = 0; i < 4; ++i) at[i] = x + 3 * i * ld;
    const char* w = panel + 2 * kScaleBytes + column * 4;
    for (int64_t k = 0; k < padded_k; k += kUnit, w += kPanel * 4) {
      __builtin_prefetch(w + 2048);
      if (kStripe > 16) __builtin_prefetch(w + 2048 + 64);
      Codes codes[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) codes[v] = load_codes(w + v * kLanes * 4);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const Four four = load_four(at[r / 3] + (r % 3) * ld + k);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) add_four(sums[r][v], codes[v], four);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      float scale;
      __builtin_memcpy(&scale, x + r * ld + padded_k, sizeof(float));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = column + v * kLanes;
        const f32v value = finished(sums[r][v], code_sums + c) * (f32v::set(scale) * f32v::load(scales + c));
        value.store(out + r * kPanel + c);
      }
    }
  }
}

template <int rows>
ML_INLINE void run_at_most(int64_t wanted, const char* panel, const char* x, int64_t ld, int64_t padded_k, float* out) {
  if constexpr (rows > 1) {
    if (wanted < rows) return run_at_most<rows - 1>(wanted, panel, x, ld, padded_k, out);
  }
  run_rows<rows>(panel, x, ld, padded_k, out);
}

int64_t row_bytes(const QuantLayout& q) { return q.padded_k + int64_t(sizeof(float)); }

void tile(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  const int64_t groups = (rows + kMostRows - 1) / kMostRows;
  in_segments(w, panel, x, rows, out, row_bytes, [rows, groups](const Panel& p, PreparedRows part, float* sums) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
      const char* const row = static_cast<const char*>(part.data) + begin * part.ld_bytes;
      run_at_most<kMostRows>(end - begin, p.data, row, part.ld_bytes, p.q.padded_k, sums + begin * kPanel);
    }
  });
}

int64_t prepared_bytes(const PackedWeight& w, DType) { return sum_of(w, row_bytes); }

/// The largest magnitude becomes 127; a row of zeros has scale 0.
template <class T>
void quantize_row(const T* x, int64_t k, int64_t padded_k, char* out) {
  f32v largest = f32v::zero();
  for (int64_t i = 0; i < k; i += f32v::N) {
    largest = max(largest, abs(f32v::load(x + i, k - i < f32v::N ? int(k - i) : f32v::N)));
  }
  const float most = max(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f, scale = most / 127.0f;
  for (int64_t i = 0; i < k; i += f32v::N) {
    const int count = k - i < f32v::N ? int(k - i) : f32v::N;
    float codes[f32v::N];
    round(f32v::load(x + i, count) * f32v::set(inverse)).store(codes);
    for (int j = 0; j < count; ++j) out[i + j] = char(int(codes[j]) + kShift);
  }
  for (int64_t i = k; i < padded_k; ++i) out[i] = char(kShift);
  __builtin_memcpy(out + padded_k, &scale, sizeof(float));
}

PreparedRows prepare(const PackedWeight& w, PreparedRows x, int64_t rows, void* out) {
  const PreparedRows done{out, DType::i8, prepared_bytes(w, x.type)};
  for (int64_t r = 0; r < rows; ++r) {
    char* to = static_cast<char*>(out) + r * done.ld_bytes;
    const char* from = static_cast<const char*>(x.from_row(r).data);
    for (const QuantLayout& q : quant_segments(w)) {
      if (x.type == DType::bf16) {
        quantize_row(reinterpret_cast<const bf16*>(from), q.k, q.padded_k, to);
      } else if (x.type == DType::f16) {
        quantize_row(reinterpret_cast<const fp16*>(from), q.k, q.padded_k, to);
      } else {
        quantize_row(reinterpret_cast<const float*>(from), q.k, q.padded_k, to);
      }
      from += q.k * bytes_of(x.type);
      to += row_bytes(q);
    }
  }
  return done;
}

}  // namespace

const TileOps w8a8_table = {prepared_bytes, prepare, tile};

}  // namespace ml::ML_ISA
