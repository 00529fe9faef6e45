#include "ops/quant.h"

#include "ops/quant_codes.h"
#include "ops/quant_dot.h"
#include "ops/quant_panel.h"
#include "simd/vec.h"
#if defined(ML_ISA_AVX512)
#include "ops/quant_fixed.h"
#endif

namespace ml::ML_ISA {
namespace {

#if defined(ML_ISA_AVX512)
constexpr int kFloatRows = 12;  // of a register tile
#elif defined(ML_ISA_AVX2)
constexpr int kFloatRows = 4;
#else
constexpr int kFloatRows = 2;
#endif

/// One chunk of x, float, times one chunk of widened codes [k][32].
template <int rows>
struct FloatTile {
  static void run(const Panel& p, int64_t s, const float* codes, const char* x, int64_t ld, float* out) {
    const int64_t count = p.q.units(s) * kUnit;
    const char* const first = x + p.q.begin(s) * int64_t(sizeof(float));
    for (int64_t column = 0; column < kPanel; column += kStripe) {
      f32v sums[rows][kVectors];
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
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
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        add_chunk(p, s, chunk_sum<float>(p.q, x + r * ld, s), sums[r], column, out + r * kPanel);
      }
    }
  }
};

template <class Codes>
void float_rows(const Panel& p, PreparedRows x, int64_t rows, float* out) {
  alignas(64) float codes[kChunk * kPanel];
  const int64_t groups = (rows + kFloatRows - 1) / kFloatRows;
  for (int64_t s = 0; s < p.q.chunks; ++s) {
    const char* const from = p.codes(s);
    for (int64_t u = 0; u < p.q.units(s); ++u) Codes::widen(from + u * Codes::kBytes, codes + u * kUnit * kPanel);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
      const char* const row = static_cast<const char*>(x.from_row(begin).data);
      with_rows<FloatTile, kFloatRows>(end - begin, p, s, codes, row, x.ld_bytes, out + begin * kPanel);
    }
  }
}

/// What rows of `x_type` become: i8 stands for the digits of quant_fixed.h.
ML_INLINE DType working_type(const PackedWeight& w, DType x_type) {
#if defined(ML_ISA_AVX512)
  if (w.kind != WeightKind::fp8 && x_type != DType::f32) return DType::i8;
  if (x_type == DType::bf16) return DType::bf16;
#endif
  (void)w, (void)x_type;
  return DType::f32;
}

int64_t row_bytes(const QuantLayout& q, DType type) {
#if defined(ML_ISA_AVX512)
  if (type == DType::i8) return fixed_row_bytes(q);
#endif
  return q.padded_k * bytes_of(type) + (q.zeros ? q.chunks * 4 : 0);
}

int64_t prepared_bytes(const PackedWeight& w, DType x_type) {
  const QuantLayout& q = quant_segments(w)[0];  // of several each is a multiple of a unit
  const DType type = working_type(w, x_type);
  if (type == x_type && q.padded_k == q.k && !q.zeros && q.order.empty()) return 0;
  return sum_of(w, [type](const QuantLayout& part) { return row_bytes(part, type); });
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

/// Writes the sum of every chunk of x behind its row.
template <class T>
void add_sums(const QuantLayout& q, char* row) {
  const T* const x = reinterpret_cast<const T*>(row);
  for (int64_t s = 0; s < q.chunks; ++s) {
    const int64_t count = q.units(s) * kUnit;
    f32v lanes = f32v::zero();
    for (int64_t i = 0; i < count; i += f32v::N) {
      lanes += f32v::load(x + q.begin(s) + i, count - i < f32v::N ? int(count - i) : f32v::N);
    }
    const float total = sum(lanes);
    __builtin_memcpy(row + q.padded_k * int64_t(sizeof(T)) + s * 4, &total, sizeof(float));
  }
}

template <class From, class To>
void prepare_row(const QuantLayout& q, const void* x, char* out) {
  gather(q, q.k, static_cast<const From*>(x), reinterpret_cast<To*>(out));
  if (q.zeros) add_sums<To>(q, out);
}

using PrepareRow = void (*)(const QuantLayout& q, const void* x, char* out);

PrepareRow prepare_for(DType x_type, DType type) {
#if defined(ML_ISA_AVX512)
  if (type == DType::i8) {
    if (x_type == DType::bf16) {
      return [](const QuantLayout& q, const void* x, char* out) { fix_row(q, static_cast<const bf16*>(x), q.k, out); };
    }
    return [](const QuantLayout& q, const void* x, char* out) { fix_row(q, static_cast<const fp16*>(x), q.k, out); };
  }
#endif
  if (x_type == DType::f32) return prepare_row<float, float>;
  if (x_type == DType::f16) return prepare_row<fp16, float>;
  return type == DType::bf16 ? prepare_row<bf16, bf16> : prepare_row<bf16, float>;
}

PreparedRows prepare(const PackedWeight& w, PreparedRows x, int64_t rows, void* out) {
  const DType type = working_type(w, x.type);
  const auto bytes = [type](const QuantLayout& q) { return row_bytes(q, type); };
  const PreparedRows done{out, type, sum_of(w, bytes)};
  const PrepareRow prepare_one = prepare_for(x.type, type);
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = static_cast<const char*>(x.from_row(r).data);
    char* to = static_cast<char*>(out) + r * done.ld_bytes;
    for (const QuantLayout& q : quant_segments(w)) {
      prepare_one(q, from, to);
      from += q.k * bytes_of(x.type);
      to += bytes(q);
    }
  }
  return done;
}

void clear(float* out, int64_t rows) {
  for (int64_t i = 0; i < rows * kPanel; i += f32v::N) f32v::zero().store(out + i);
}

template <class Codes>
struct Whole {
  static ML_INLINE void run(const Panel& p, PreparedRows x, int64_t rows, float* out) {
#if defined(ML_ISA_AVX512)
    if (x.type == DType::i8) return fixed_rows<Codes>(p, x, rows, out);
#endif
    float_rows<Codes>(p, x, rows, out);
  }
};

template <class Codes>
struct Fp8 {
  static ML_INLINE void run(const Panel& p, PreparedRows x, int64_t rows, float* out) {
#if defined(ML_ISA_AVX512)
    if (x.type == DType::bf16) return dot_rows<Codes>(p, x, rows, out);
#endif
    float_rows<Codes>(p, x, rows, out);
  }
};

template <class Run>
void tile(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  const auto bytes = [&x](const QuantLayout& q) { return row_bytes(q, x.type); };
  in_segments(w, panel, x, rows, out, bytes, [rows](const Panel& p, PreparedRows part, float* sums) {
    clear(sums, rows);
    Run::run(p, part, rows, sums);
  });
}

}  // namespace

const TileOps quant_int8_table = {prepared_bytes, prepare, tile<Whole<Int8Codes>>};
const TileOps quant_int4_table = {prepared_bytes, prepare, tile<Whole<Int4Codes>>};
const TileOps quant_e4m3_table = {prepared_bytes, prepare, tile<Fp8<E4m3Codes>>};
const TileOps quant_e5m2_table = {prepared_bytes, prepare, tile<Fp8<E5m2Codes>>};

}  // namespace ml::ML_ISA
