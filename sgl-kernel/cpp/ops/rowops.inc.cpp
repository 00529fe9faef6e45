#include "ops/rowops.h"

#include <cmath>
#include <type_traits>

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

constexpr int64_t kLanes = f32v::N;

/// body(at, count) for each vector of a row; count < kLanes only in the last.
template <class Body>
ML_INLINE void each_vector(int64_t dim, Body body) {
  int64_t at = 0;
  for (; at + kLanes <= dim; at += kLanes) body(at, int(kLanes));
  if (at < dim) body(at, int(dim - at));
}

template <class T>
ML_INLINE f32v load(const T* from, int count) {
  return count == kLanes ? f32v::load(from) : f32v::load(from, count);
}

template <class T>
ML_INLINE void store(f32v v, T* to, int count) {
  if (count == kLanes) {
    v.store(to);
  } else {
    v.store(to, count);
  }
}

template <class T>
ML_INLINE f32v rounded(f32v v) {
  if constexpr (std::is_same_v<T, float>) return v;
  T narrow[kLanes];
  v.store(narrow);
  return f32v::load(narrow);
}

/// 1 / sqrt(mean(x^2) + eps). Four chains of additions, always the same elements in each.
template <class T>
float inverse_rms(const T* x, int64_t dim, float eps) {
  f32v sums[4] = {f32v::zero(), f32v::zero(), f32v::zero(), f32v::zero()};
  int64_t at = 0;
  for (; at + 4 * kLanes <= dim; at += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const f32v v = f32v::load(x + at + i * kLanes);
      sums[i] = fma(v, v, sums[i]);
    }
  }
  for (int i = 0; at < dim; at += kLanes, ++i) {
    const f32v v = load(x + at, int(dim - at < kLanes ? dim - at : kLanes));
    sums[i] = fma(v, v, sums[i]);
  }
  return 1.0f / std::sqrt(sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(dim) + eps);
}

template <class T>
void add_row(T* residual, const T* x, int64_t dim) {
  each_vector(dim, [&](int64_t at, int count) {
    store(load(residual + at, count) + load(x + at, count), residual + at, count);
  });
}

/// put(at, count, value) gets each normalised, weighted and rounded vector of the row.
template <class T, class Put>
ML_INLINE void normalise(const RmsNorm& op, const T* x, Put put) {
  const f32v scale = f32v::set(inverse_rms(x, op.dim, op.eps));
  if (op.form == NormForm::gemma) {
    const float* weight = static_cast<const float*>(op.weight);
    each_vector(op.dim, [&](int64_t at, int count) {
      put(at, count, rounded<T>(load(x + at, count) * scale * load(weight + at, count)));
    });
  } else {
    const T* weight = static_cast<const T*>(op.weight);
    each_vector(op.dim, [&](int64_t at, int count) {
      put(at, count, rounded<T>(rounded<T>(load(x + at, count) * scale) * load(weight + at, count)));
    });
  }
}

template <class T>
void rms_norm_rows(const RmsNorm& op, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(op.x) + row * op.ldx;
    T* residual = static_cast<T*>(op.residual) + row * op.ld_residual;
    if (op.sum == NormSum::after) {
      normalise(op, x,
                [&](int64_t at, int count, f32v v) { store(load(residual + at, count) + v, residual + at, count); });
      continue;
    }
    if (op.sum == NormSum::before) {
      add_row(residual, x, op.dim);
      x = residual;
    }
    T* y = static_cast<T*>(op.y) + row * op.ldy;
    normalise(op, x, [&](int64_t at, int count, f32v v) { store(v, y + at, count); });
  }
}

template <class T, class Act>
ML_INLINE void gated_rows(const GatedAct& op, int64_t first, int64_t last, Act act) {
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(op.x) + row * op.ldx;
    const T* up = gate + op.dim;
    T* y = static_cast<T*>(op.y) + row * op.ldy;
    each_vector(op.dim, [&](int64_t at, int count) {
      store(act(load(gate + at, count)) * load(up + at, count), y + at, count);
    });
  }
}

template <class T>
void gated_of(const GatedAct& op, int64_t first, int64_t last) {
  switch (op.gate) {
    case Gate::silu:
      return gated_rows<T>(op, first, last, [](f32v v) { return silu(v); });
    case Gate::gelu_tanh:
      return gated_rows<T>(op, first, last, [](f32v v) { return gelu_tanh(v); });
    case Gate::gelu_erf:
      return gated_rows<T>(op, first, last, [](f32v v) { return gelu_erf(v); });
    case Gate::relu:
      return gated_rows<T>(op, first, last, [](f32v v) { return max(v, f32v::zero()); });
  }
}

template <class T>
void embedding_rows(const Embedding& op, int64_t first, int64_t last) {
  const f32v scale = f32v::set(op.scale);
  for (int64_t row = first; row < last; ++row) {
    const T* from = static_cast<const T*>(op.table) + op.ids[row] * op.ld_table;
    T* y = static_cast<T*>(op.y) + row * op.ldy;
    if (op.scale == 1.0f) {
      std::memcpy(y, from, size_t(op.dim) * sizeof(T));
    } else {
      each_vector(op.dim, [&](int64_t at, int count) { store(load(from + at, count) * scale, y + at, count); });
    }
  }
}

void rms_norm_any(const RmsNorm& op, int64_t first, int64_t last) {
  if (op.type == DType::f32) return rms_norm_rows<float>(op, first, last);
  if (op.type == DType::bf16) return rms_norm_rows<bf16>(op, first, last);
  rms_norm_rows<fp16>(op, first, last);
}

void gated_any(const GatedAct& op, int64_t first, int64_t last) {
  if (op.type == DType::f32) return gated_of<float>(op, first, last);
  if (op.type == DType::bf16) return gated_of<bf16>(op, first, last);
  gated_of<fp16>(op, first, last);
}

void embedding_any(const Embedding& op, int64_t first, int64_t last) {
  if (op.type == DType::f32) return embedding_rows<float>(op, first, last);
  if (op.type == DType::bf16) return embedding_rows<bf16>(op, first, last);
  embedding_rows<fp16>(op, first, last);
}

}  // namespace

const RowOps rowops_table = {rms_norm_any, gated_any, embedding_any};

}  // namespace ml::ML_ISA
