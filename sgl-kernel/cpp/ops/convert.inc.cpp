#include "ops/convert.h"

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

template <class From, class To>
void convert(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + f32v::N <= n; i += f32v::N) f32v::load(from + i).store(to + i);
  if (i < n) f32v::load(from + i, int(n - i)).store(to + i, int(n - i));
}

void to_f32(const void* from, DType type, float* to, int64_t n) {
  switch (type) {
    case DType::bf16:
      return convert(static_cast<const bf16*>(from), to, n);
    case DType::f16:
      return convert(static_cast<const fp16*>(from), to, n);
    case DType::fp8_e4m3:
      return convert(static_cast<const fp8_e4m3*>(from), to, n);
    case DType::fp8_e5m2:
      return convert(static_cast<const fp8_e5m2*>(from), to, n);
    case DType::i8:
      return convert(static_cast<const int8_t*>(from), to, n);
    default:
      return convert(static_cast<const float*>(from), to, n);
  }
}

void from_f32(const float* from, void* to, DType type, int64_t n) {
  switch (type) {
    case DType::bf16:
      return convert(from, static_cast<bf16*>(to), n);
    case DType::f16:
      return convert(from, static_cast<fp16*>(to), n);
    default:
      return convert(from, static_cast<float*>(to), n);
  }
}

}  // namespace

const ConvertTable convert_table = {to_f32, from_f32};

}  // namespace ml::ML_ISA
