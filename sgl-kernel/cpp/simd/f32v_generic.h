// 8 lanes of float32 in plain C++: loops that any compiler turns into what the machine has.
// fma() is a multiplication and an addition here: a fused one without hardware costs a library call per lane.
#pragma once

#include <cstring>

#include "base/types.h"

namespace ml::ML_ISA {

struct f32v {
  static constexpr int N = 8;
  float v[N];

  static ML_INLINE f32v zero() { return set(0.0f); }
  static ML_INLINE f32v set(float x) {
    f32v r;
    for (int i = 0; i < N; ++i) r.v[i] = x;
    return r;
  }

  /// T: float, bf16, fp16, fp8_e4m3, fp8_e5m2 or int8_t.
  template <class T>
  static ML_INLINE f32v load(const T* p) {
    f32v r;
    for (int i = 0; i < N; ++i) r.v[i] = to_f32(p[i]);
    return r;
  }

  /// The first n < N elements; the other lanes are zero and their memory is not touched.
  template <class T>
  static ML_INLINE f32v load(const T* p, int n) {
    f32v r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = to_f32(p[i]);
    return r;
  }

  template <class T>
  ML_INLINE void store(T* p) const {
    for (int i = 0; i < N; ++i) from_f32(v[i], p + i);
  }

  template <class T>
  ML_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) from_f32(v[i], p + i);
  }
};

template <class F>
ML_INLINE f32v lanes(f32v a, f32v b, F f) {
  f32v r;
  for (int i = 0; i < f32v::N; ++i) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}

ML_INLINE f32v operator+(f32v a, f32v b) {
  return lanes(a, b, [](float x, float y) { return x + y; });
}
ML_INLINE f32v operator-(f32v a, f32v b) {
  return lanes(a, b, [](float x, float y) { return x - y; });
}
ML_INLINE f32v operator*(f32v a, f32v b) {
  return lanes(a, b, [](float x, float y) { return x * y; });
}
ML_INLINE f32v operator/(f32v a, f32v b) {
  return lanes(a, b, [](float x, float y) { return x / y; });
}
ML_INLINE f32v fma(f32v a, f32v b, f32v c) { return a * b + c; }

// With a NaN the second operand is the result, as on x86.
ML_INLINE f32v max(f32v a, f32v b) {
  return lanes(a, b, [](float x, float y) { return x > y ? x : y; });
}
ML_INLINE f32v min(f32v a, f32v b) {
  return lanes(a, b, [](float x, float y) { return x < y ? x : y; });
}
ML_INLINE f32v abs(f32v a) {
  return lanes(a, a, [](float x, float) { return __builtin_fabsf(x); });
}
ML_INLINE f32v sqrt(f32v a) {
  return lanes(a, a, [](float x, float) { return __builtin_sqrtf(x); });
}

/// To the nearest integer, ties to even; |a| < 2^22. Adding 1.5 * 2^23 leaves no bits behind the point.
ML_INLINE f32v round(f32v a) {
  const f32v magic = f32v::set(12582912.0f);
  return (a + magic) - magic;
}

/// 2^n for an integral n in [-126, 127].
ML_INLINE f32v pow2(f32v n) {
  return lanes(n, n, [](float x, float) { return bit_cast<float>(uint32_t(int32_t(x) + 127) << 23); });
}

/// Per lane: a < b ? yes : no.
ML_INLINE f32v select_less(f32v a, f32v b, f32v yes, f32v no) {
  f32v r;
  for (int i = 0; i < f32v::N; ++i) r.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return r;
}

/// Per lane: x where x is NaN, else `other`.
ML_INLINE f32v select_unordered(f32v x, f32v other) {
  return lanes(x, other, [](float a, float b) { return a != a ? a : b; });
}

/// Halves added until one lane is left: (0+4, 1+5 ...), then 2, 1 apart.
ML_INLINE float sum(f32v a) {
  const float* v = a.v;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

ML_INLINE float max(f32v a) {
  float r = a.v[0];
  for (int i = 1; i < f32v::N; ++i) r = a.v[i] > r ? a.v[i] : r;
  return r;
}

}  // namespace ml::ML_ISA
