#include "ops/softcap.h"
#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

void run(float* x, int64_t count, float cap) {
  const f32v bound = f32v::set(cap), inverse = f32v::set(1.0f / cap);
  int64_t i = 0;
  for (; i + f32v::N <= count; i += f32v::N) (tanh(f32v::load(x + i) * inverse) * bound).store(x + i);
  if (i < count) {
    const int rest = int(count - i);
    (tanh(f32v::load(x + i, rest) * inverse) * bound).store(x + i, rest);
  }
}

}  // namespace

const SoftcapTable softcap_table = {run};

}  // namespace ml::ML_ISA
