// f32v: a vector of float32 of this file's instruction set, with loads and stores that convert the narrow types.
//
// Included from .inc.cpp files only; everything lives in ml::ML_ISA, so the three builds never share a symbol.
// Element-wise functions use one formula on every instruction set; the results of two sets may still differ in the last
// bit (generic has no fused multiply-add). Within a set a lane's result depends on that lane alone.
#pragma once

#if !defined(ML_ISA)
#error "simd/vec.h needs -DML_ISA=..., see CMakeLists.txt"
#endif

#include <cstdint>

#include "base/types.h"

#if defined(ML_ISA_AVX512)
#include "simd/f32v_avx512.h"
#elif defined(ML_ISA_AVX2)
#include "simd/f32v_avx2.h"
#else
#include "simd/f32v_generic.h"
#endif

namespace ml::ML_ISA {

ML_INLINE f32v operator-(f32v a) { return f32v::zero() - a; }
ML_INLINE f32v& operator+=(f32v& a, f32v b) { return a = a + b; }
ML_INLINE f32v& operator*=(f32v& a, f32v b) { return a = a * b; }

/// c[0] + x (c[1] + x (...)), highest power last in `c`.
template <int n>
ML_INLINE f32v polynomial(f32v x, const float (&c)[n]) {
  f32v value = f32v::set(c[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) value = fma(value, x, f32v::set(c[i]));
  return value;
}

/// e^x within 2 ulp. Results below 2^-125.5 (x < -86.99) are 0, so exp(-inf) is 0; too large ones infinity.
ML_INLINE f32v exp(f32v x) {
  constexpr float kTail[] = {0.499999996f, 0.16666577f, 0.0416668541f, 0.00836320005f, 0.00139013057f};
  const f32v lowest = f32v::set(-87.33f), highest = f32v::set(88.73f);
  const f32v inside = min(max(x, lowest), highest);
  const f32v n = round(inside * f32v::set(1.44269504f));
  // ln 2 in two parts; the first has few enough bits that n times it is exact.
  const f32v r = fma(n, f32v::set(2.12194440e-4f), fma(n, f32v::set(-0.693359375f), inside));
  const f32v p = fma(r * r, polynomial(r, kTail), r) + f32v::set(1.0f);
  // 2^128 is no float: n = 128 is scaled in two steps.
  const f32v scaled = (p + p) * pow2(n - f32v::set(1.0f));
  const f32v low = select_less(x, lowest, f32v::zero(), scaled);
  const f32v high = select_less(highest, x, f32v::set(__builtin_inff()), low);
  return select_unordered(x, high);
}

/// Within 3 ulp.
ML_INLINE f32v sigmoid(f32v x) { return f32v::set(1.0f) / (f32v::set(1.0f) + exp(-x)); }

/// Within 3 ulp.
ML_INLINE f32v silu(f32v x) { return x / (f32v::set(1.0f) + exp(-x)); }

/// Within 3 ulp: a polynomial near zero, where 1 - 2/(e^2x + 1) would cancel, and that formula elsewhere.
ML_INLINE f32v tanh(f32v x) {
  constexpr float kNear[] = {-0.333333289f, 0.133327701f, -0.0538509511f, 0.0209973488f, -0.00609693111f};
  const f32v u = x * x;
  const f32v near = fma(x * u, polynomial(u, kNear), x);
  const f32v one = f32v::set(1.0f);
  const f32v far = one - f32v::set(2.0f) / (exp(x + x) + one);
  return select_less(abs(x), f32v::set(0.625f), near, far);
}

/// 1 - erf(z) for z >= 0, small relative error everywhere: exp(-z^2) times a polynomial in 1 / (1 + 0.35 z).
ML_INLINE f32v erfc_positive(f32v z) {
  constexpr float kScaled[] = {7.18169378e-06f, 0.197271978f,  0.199814991f, 0.168639276f,
                               0.239322646f,    -0.124156619f, 0.655176143f, -0.849494336f,
                               0.984877238f,    -0.665803956f, 0.224565549f, -0.0302200933f};
  const f32v one = f32v::set(1.0f);
  const f32v t = one / fma(z, f32v::set(0.35f), one);
  const f32v square = z * z;
  const f32v lost = fma(z, z, -square);  // what rounding took from z^2, given back to first order
  return exp(-square) * (one - lost) * polynomial(t, kScaled);
}

/// x Phi(x), the exact form of GELU. Within 24 ulp for |x| <= 4; for lower x, where it vanishes as e^(-x^2/2), the
/// rounding of x^2 counts: 80 ulp at -8.
ML_INLINE f32v gelu_erf(f32v x) {
  const f32v z = min(abs(x) * f32v::set(0.707106781f), f32v::set(16.0f));  // 0 from 10 on; of infinity it would be NaN
  const f32v half_tail = f32v::set(0.5f) * erfc_positive(z);
  const f32v phi = select_less(x, f32v::zero(), half_tail, f32v::set(1.0f) - half_tail);
  return x * phi;
}

/// The tanh form of GELU: x/2 (1 + tanh(y)), y = sqrt(2/pi) (x + 0.044715 x^3), written as x sigmoid(2y), which does not
/// cancel for negative x. As exact as gelu_erf.
ML_INLINE f32v gelu_tanh(f32v x) {
  const f32v twice = f32v::set(1.59576912f) * fma(f32v::set(0.044715f) * x * x, x, x);
  return x / (f32v::set(1.0f) + exp(-twice));
}

}  // namespace ml::ML_ISA
