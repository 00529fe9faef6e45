#include "ops/math.h"

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

template <class F>
ML_INLINE void over(const float* x, float* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + f32v::N <= n; i += f32v::N) f(f32v::load(x + i)).store(y + i);
  if (i < n) f(f32v::load(x + i, int(n - i))).store(y + i, int(n - i));
}

void exps(const float* x, float* y, int64_t n) { over(x, y, n, [](f32v v) { return exp(v); }); }
void sigmoids(const float* x, float* y, int64_t n) { over(x, y, n, [](f32v v) { return sigmoid(v); }); }
void silus(const float* x, float* y, int64_t n) { over(x, y, n, [](f32v v) { return silu(v); }); }
void tanhs(const float* x, float* y, int64_t n) { over(x, y, n, [](f32v v) { return tanh(v); }); }
void gelus(const float* x, float* y, int64_t n) { over(x, y, n, [](f32v v) { return gelu_erf(v); }); }
void gelu_tanhs(const float* x, float* y, int64_t n) { over(x, y, n, [](f32v v) { return gelu_tanh(v); }); }

}  // namespace

const MathTable math_table = {exps, sigmoids, silus, tanhs, gelus, gelu_tanhs};

}  // namespace ml::ML_ISA
