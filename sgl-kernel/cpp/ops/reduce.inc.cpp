#include "ops/reduce.h"

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

ML_INLINE f32v sum(const Parts& parts, int64_t at, int lanes) {
  f32v value[kMostParts];
  for (int i = 0; i < parts.count; ++i) {
    value[i] = lanes == f32v::N ? f32v::load(parts.part[i] + at) : f32v::load(parts.part[i] + at, lanes);
  }
  for (int step = 1; step < parts.count; step *= 2) {
    for (int i = 0; i < parts.count; i += 2 * step) value[i] = value[i] + value[i + step];
  }
  return value[0];
}

template <class T>
void finish_as(const Parts& parts, int64_t columns, const float* bias, const void* residual, void* out) {
  for (int64_t at = 0; at < columns; at += f32v::N) {
    const int lanes = columns - at < f32v::N ? int(columns - at) : f32v::N;
    f32v value = sum(parts, at, lanes);
    if (bias != nullptr) value = value + f32v::load(bias + at, lanes);
    if (residual != nullptr) value = value + f32v::load(static_cast<const T*>(residual) + at, lanes);
    value.store(static_cast<T*>(out) + at, lanes);
  }
}

void finish(const Parts& parts, int64_t columns, const float* bias, const void* residual, DType type, void* out) {
  switch (type) {
    case DType::bf16:
      return finish_as<bf16>(parts, columns, bias, residual, out);
    case DType::f16:
      return finish_as<fp16>(parts, columns, bias, residual, out);
    default:
      return finish_as<float>(parts, columns, bias, residual, out);
  }
}

}  // namespace

const ReduceTable reduce_table = {finish};

}  // namespace ml::ML_ISA
