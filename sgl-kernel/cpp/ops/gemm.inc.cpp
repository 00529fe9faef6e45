#include "ops/gemm.h"

#include <cstddef>

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

// How far ahead the loops ask for their weights (a panel is read front to back, and the next one follows it). Few rows
// wait for memory: the lines go straight to L1. Many rows compute for as long as memory needs: asking L2 early evens
// out its hiccups (measured on Zen 4: 15-20 % faster from 8 rows on, but 20 % slower at 4).
constexpr int64_t kAhead = 4096, kAheadL2 = 16384, kAheadL1 = 1024;
constexpr int kRowsComputing = 6;

#if defined(ML_ISA_AVX512)
constexpr int kRowsF32 = 12, kRowsBf16 = 12, kVectors = 2;  // 24 sums, 2 weights, 1 broadcast of 32 registers
#elif defined(ML_ISA_AVX2)
constexpr int kRowsF32 = 6, kRowsBf16 = 4, kVectors = 2;  // 16 registers
#else
constexpr int kRowsF32 = 2, kRowsBf16 = 2, kVectors = 2;
#endif

constexpr int kStripe = kVectors * f32v::N;  // columns of a panel that one pass of a loop computes

/// Address of row r, written so that twelve rows need four registers: x86 adds once or twice `ld` for free.
template <class T>
ML_INLINE const T* row_of(const T* const (&base)[4], int r, int64_t ld_bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base[r / 3]) + (r % 3) * ld_bytes);
}

template <class T>
ML_INLINE void set_bases(const void* x, int64_t ld_bytes, const T* (&base)[4]) {
  for (int i = 0; i < 4; ++i) base[i] = reinterpret_cast<const T*>(static_cast<const char*>(x) + 3 * i * ld_bytes);
}

/// For one line of kStripe 32-bit units.
template <int rows>
ML_INLINE void prefetch(const void* line) {
  const char* const p = static_cast<const char*>(line);
#pragma GCC unroll 2
  for (size_t at = 0; at < kStripe * sizeof(float); at += 64) {
    if (rows < kRowsComputing) {
      __builtin_prefetch(p + kAhead + at);
    } else {
      __builtin_prefetch(p + kAheadL2 + at, 0, 2);
      __builtin_prefetch(p + kAheadL1 + at);
    }
  }
}

template <int rows>
ML_INLINE void clear(f32v (&sum)[rows][kVectors]) {
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = f32v::zero();
  }
}

template <int rows>
ML_INLINE void write(const f32v (&sum)[rows][kVectors], float* out) {
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(out + r * kPanel + v * f32v::N);
  }
}

template <int rows>
ML_INLINE void accumulate(f32v (&sum)[rows][kVectors], int r, f32v x, const f32v (&w)[kVectors]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
}

/// One stripe of a float panel, x float.
struct F32Loop {
  static constexpr int kRows = kRowsF32;

  template <int rows>
  static void run(const char* stripe, const void* x, int64_t ld_bytes, int64_t k, float* out) {
    f32v sum[rows][kVectors], w[kVectors];
    clear(sum);
    const float* base[4];
    set_bases(x, ld_bytes, base);
    const float* line = reinterpret_cast<const float*>(stripe);
    for (int64_t i = 0; i < k; ++i, line += kPanel) {
      prefetch<rows>(line);
      for (int v = 0; v < kVectors; ++v) w[v] = f32v::load(line + v * f32v::N);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) accumulate(sum, r, f32v::set(row_of(base, r, ld_bytes)[i]), w);
    }
    write(sum, out);
  }
};

/// The two bf16 of each 32-bit lane as floats: the first (low) or the second (high).
ML_INLINE f32v first_of_pair(const uint32_t* p) {
#if defined(ML_ISA_AVX512)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
#elif defined(ML_ISA_AVX2)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
#else
  f32v value;
  for (int i = 0; i < f32v::N; ++i) value.v[i] = bit_cast<float>(p[i] << 16);
  return value;
#endif
}

ML_INLINE f32v second_of_pair(const uint32_t* p) {
#if defined(ML_ISA_AVX512)
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000u))));
#elif defined(ML_ISA_AVX2)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000u))));
#else
  f32v value;
  for (int i = 0; i < f32v::N; ++i) value.v[i] = bit_cast<float>(p[i] & 0xffff0000u);
  return value;
#endif
}

/// One stripe of a bf16 panel, x float: exact products, the weights widened in registers.
struct WidenLoop {
  static constexpr int kRows = kRowsBf16;

  template <int rows>
  static void run(const char* stripe, const void* x, int64_t ld_bytes, int64_t k, float* out) {
    f32v sum[rows][kVectors], w[kVectors];
    clear(sum);
    const float* base[4];
    set_bases(x, ld_bytes, base);
    const uint32_t* line = reinterpret_cast<const uint32_t*>(stripe);
    for (int64_t i = 0; i < k; i += 2, line += kPanel) {
      prefetch<rows>(line);
      for (int v = 0; v < kVectors; ++v) w[v] = first_of_pair(line + v * f32v::N);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) accumulate(sum, r, f32v::set(row_of(base, r, ld_bytes)[i]), w);
      if (i + 1 == k) break;
      for (int v = 0; v < kVectors; ++v) w[v] = second_of_pair(line + v * f32v::N);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) accumulate(sum, r, f32v::set(row_of(base, r, ld_bytes)[i + 1]), w);
    }
    write(sum, out);
  }
};

#if defined(ML_ISA_AVX512)
/// One stripe of a bf16 panel, x bf16 with an even number of elements: two products per lane and instruction.
struct DotLoop {
  static constexpr int kRows = kRowsBf16;

  template <int rows>
  static void run(const char* stripe, const void* x, int64_t ld_bytes, int64_t k, float* out) {
    f32v sum[rows][kVectors];
    clear(sum);
    const bf16* base[4];
    set_bases(x, ld_bytes, base);
    const char* line = stripe;
    for (int64_t i = 0; i < k; i += 2, line += kPanel * 4) {
      prefetch<rows>(line);
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(line), w1 = (__m512bh)_mm512_loadu_si512(line + 64);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        int pair;
        __builtin_memcpy(&pair, row_of(base, r, ld_bytes) + i, 4);
        const __m512bh x_pair = (__m512bh)_mm512_set1_epi32(pair);
        sum[r][0].v = _mm512_dpbf16_ps(sum[r][0].v, w0, x_pair);
        sum[r][1].v = _mm512_dpbf16_ps(sum[r][1].v, w1, x_pair);
      }
    }
    write(sum, out);
  }
};
#endif

using RunRows = void (*)(const char* stripe, const void* x, int64_t ld_bytes, int64_t k, float* out);

template <class Loop, int rows = Loop::kRows>
ML_INLINE RunRows loop_for(int64_t wanted) {
  if constexpr (rows > 1) {
    if (wanted < rows) return loop_for<Loop, rows - 1>(wanted);
  }
  return Loop::template run<rows>;
}

/// to += from for `rows` rows of a stripe.
ML_INLINE void add_stripe(const float* from, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * kPanel + v * f32v::N;
      (f32v::load(from + at) + f32v::load(to + at)).store(to + at);
    }
  }
}

/// A stripe of a weight in segments. A sum waits at its level of the tree for its right neighbour, as the digits of a
/// binary counter do.
template <int kRows>
void run_segments(const PackedWeight& w, RunRows run, const char* stripe, PreparedRows x, int64_t rows, float* out) {
  constexpr int kLevels = 3;
  static_assert(kMostSegments == 1 << kLevels);
  alignas(64) float waiting[kLevels][kRows * kPanel];
  const int64_t k = w.k / w.segments, panel_step = w.panel_bytes / w.segments, x_step = k * bytes_of(x.type);
  for (int64_t s = 0; s < w.segments; ++s) {
    const int level = __builtin_ctzll(~uint64_t(s));  // so many neighbours on the left wait for this one
    float* const sums = s + 1 == w.segments ? out : waiting[level];
    run(stripe + s * panel_step, static_cast<const char*>(x.data) + s * x_step, x.ld_bytes, k, sums);
    for (int i = 0; i < level; ++i) add_stripe(waiting[i], rows, sums);
  }
}

/// All rows over one panel: groups of nearly equal height, so that no group is too thin to hide the latency of the
/// sums.
template <class Loop>
void run_panel(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  const int64_t groups = (rows + Loop::kRows - 1) / Loop::kRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
    const RunRows run = loop_for<Loop>(end - begin);
    for (int64_t c = 0; c < kPanel; c += kStripe) {
      const char* const stripe = w.panel(panel) + c * 4;
      float* const sums = out + begin * kPanel + c;
      if (w.segments == 1) {
        run(stripe, x.from_row(begin).data, x.ld_bytes, w.k, sums);
      } else {
        run_segments<Loop::kRows>(w, run, stripe, x.from_row(begin), end - begin, sums);
      }
    }
  }
}

template <class T>
void widen_rows(const void* from, int64_t k, float* out) {
  const T* x = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + f32v::N <= k; i += f32v::N) f32v::load(x + i).store(out + i);
  if (i < k) f32v::load(x + i, int(k - i)).store(out + i, int(k - i));
}

PreparedRows to_f32(const PackedWeight& w, PreparedRows x, int64_t rows, void* out) {
  const PreparedRows done{out, DType::f32, w.k * int64_t(sizeof(float))};
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = static_cast<float*>(out) + r * w.k;
    if (x.type == DType::bf16) {
      widen_rows<bf16>(x.from_row(r).data, w.k, row);
    } else {
      widen_rows<fp16>(x.from_row(r).data, w.k, row);
    }
  }
  return done;
}

int64_t f32_prepared_bytes(const PackedWeight& w, DType x_type) {
  return x_type == DType::f32 ? 0 : w.k * int64_t(sizeof(float));
}

void f32_tile(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  run_panel<F32Loop>(w, panel, x, rows, out);
}

#if defined(ML_ISA_AVX512)
/// bf16 rows are read in pairs; an odd row gets a zero at its end.
int64_t bf16_prepared_bytes(const PackedWeight& w, DType x_type) {
  if (x_type == DType::bf16) return w.k % 2 == 0 ? 0 : (w.k + 1) * int64_t(sizeof(bf16));
  return f32_prepared_bytes(w, x_type);
}

PreparedRows bf16_prepare(const PackedWeight& w, PreparedRows x, int64_t rows, void* out) {
  if (x.type != DType::bf16) return to_f32(w, x, rows, out);
  const PreparedRows done{out, DType::bf16, (w.k + 1) * int64_t(sizeof(bf16))};
  for (int64_t r = 0; r < rows; ++r) {
    bf16* const row = static_cast<bf16*>(out) + r * (w.k + 1);
    __builtin_memcpy(row, x.from_row(r).data, size_t(w.k) * sizeof(bf16));
    row[w.k].bits = 0;
  }
  return done;
}

void bf16_tile(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  if (x.type == DType::bf16) {
    run_panel<DotLoop>(w, panel, x, rows, out);
  } else {
    run_panel<WidenLoop>(w, panel, x, rows, out);
  }
}

constexpr TileOps kBf16Tiles = {bf16_prepared_bytes, bf16_prepare, bf16_tile};
#else
void bf16_tile(const PackedWeight& w, int64_t panel, PreparedRows x, int64_t rows, float* out) {
  run_panel<WidenLoop>(w, panel, x, rows, out);
}

constexpr TileOps kBf16Tiles = {f32_prepared_bytes, to_f32, bf16_tile};
#endif

ML_INLINE f32v activate(f32v x, Activation act) {
  switch (act) {
    case Activation::silu:
      return silu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::gelu_erf:
      return gelu_erf(x);
    case Activation::relu:
      return max(x, f32v::zero());
    default:
      return x;
  }
}

ML_INLINE f32v bounded(f32v gate, f32v up, const Bounds& bounds) {
  const f32v limit = f32v::set(bounds.limit), one = f32v::set(1.0f);
  const f32v held = min(gate, limit);
  return (min(max(up, -limit), limit) + one) * (held * sigmoid(held * f32v::set(bounds.alpha)));
}

/// `count` <= N lanes at column `column` of the panel's part of y.
template <class T>
ML_INLINE void finish_lanes(const PackedWeight& w, const float* tile, int64_t row, int64_t first, int64_t column,
                            int count, const Output& y, const Epilogue& e) {
  const float* const sums = tile + row * kPanel + column;
  const int64_t at = first + column;
  f32v value = f32v::load(sums);
  if (e.bias != nullptr) value = value + f32v::load(e.bias + at, count);
  if (w.gated) {
    f32v up = f32v::load(sums + kPanel / 2);
    if (e.bias != nullptr) up = up + f32v::load(e.bias + w.columns() + at, count);
    value = e.act == Activation::bounded ? bounded(value, up, w.bounds) : activate(value, e.act) * up;
  } else {
    value = activate(value, e.act);
  }
  if (e.residual != nullptr) {
    value = value + f32v::load(static_cast<const T*>(e.residual) + row * e.ld_residual + at, count);
  }
  T* const out = static_cast<T*>(y.data) + row * y.ld + at;
  if (count == f32v::N) {
    value.store(out);
  } else {
    value.store(out, count);
  }
}

template <class T>
void finish_as(const PackedWeight& w, int64_t panel, const float* tile, int64_t rows, const Output& y,
               const Epilogue& epilogue) {
  const int64_t first = panel * w.panel_columns();
  const int64_t left = w.columns() - first;
  const int64_t columns = left < w.panel_columns() ? left : w.panel_columns();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < columns; c += f32v::N) {
      const int count = columns - c < f32v::N ? int(columns - c) : f32v::N;
      finish_lanes<T>(w, tile, row, first, c, count, y, epilogue);
    }
  }
}

void finish(const PackedWeight& w, int64_t panel, const float* tile, int64_t rows, const Output& y,
            const Epilogue& epilogue) {
  Epilogue own = epilogue;
  if (own.bias == nullptr) own.bias = w.bias.get();
  switch (y.type) {
    case DType::bf16:
      return finish_as<bf16>(w, panel, tile, rows, y, own);
    case DType::f16:
      return finish_as<fp16>(w, panel, tile, rows, y, own);
    default:
      return finish_as<float>(w, panel, tile, rows, y, own);
  }
}

}  // namespace

const GemmTable gemm_table = {{f32_prepared_bytes, to_f32, f32_tile}, kBf16Tiles, finish};

}  // namespace ml::ML_ISA
