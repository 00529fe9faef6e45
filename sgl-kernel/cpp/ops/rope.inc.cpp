// Norm and rotation of q and k heads, and the write into pages; see rope.h. Sums and products are float32, rounded to
// the tokens' type where layers/norm.py and layers/rotary.py round.
#include "ops/rope.h"

#include <type_traits>

#include "simd/vec.h"

namespace ml::ML_ISA {

namespace {

constexpr int N = f32v::N;

template <class T>
ML_INLINE f32v load_some(const T* p, int left) {
  return left >= N ? f32v::load(p) : f32v::load(p, left);
}

template <class T>
ML_INLINE void store_some(f32v x, T* p, int left) {
  if (left >= N) {
    x.store(p);
  } else {
    x.store(p, left);
  }
}

template <class T>
ML_INLINE f32v rounded(f32v x) {
  T narrow[N];
  x.store(narrow);
  return f32v::load(narrow);
}
template <>
ML_INLINE f32v rounded<float>(f32v x) {
  return x;
}

template <class T>
ML_INLINE float rounded_one(float x) {
  T narrow;
  from_f32(x, &narrow);
  return to_f32(narrow);
}

/// x: `dim` float32, of which the first norm.dim are normalised in place.
template <class T, class W>
void normalise(const HeadNorm& norm, float eps, float* x) {
  f32v squares = f32v::zero();
  for (int i = 0; i < norm.dim; i += N) {
    const f32v v = load_some(x + i, norm.dim - i);
    squares = fma(v, v, squares);
  }
  const f32v inverse = f32v::set(1.0f / __builtin_sqrtf(sum(squares) / float(norm.dim) + eps));
  const W* weight = static_cast<const W*>(norm.weight);
  constexpr bool round_first = sizeof(T) == sizeof(W) && sizeof(T) < 4;
  for (int i = 0; i < norm.dim; i += N) {
    const int left = norm.dim - i;
    const f32v v = load_some(x + i, left) * inverse;
    const f32v scaled = (round_first ? rounded<T>(v) : v) * load_some(weight + i, left);
    store_some(rounded<T>(scaled), x + i, left);
  }
}

/// Pairs half a rotation apart. `round`: the table has the tokens' type.
template <class T, class C>
void rotate_halves(const RopeTable& rope, const C* cos, const C* sin, float* x) {
  constexpr bool round = sizeof(T) == sizeof(C);
  const int half = rope.dim / 2, second = rope.full ? half : 0;
  for (int j = 0; j < half; j += N) {
    const int left = half - j;
    const f32v a = load_some(x + j, left), b = load_some(x + half + j, left);
    const f32v cos_a = load_some(cos + j, left), cos_b = load_some(cos + second + j, left);
    const f32v sin_first = load_some(sin + j, left), sin_b = load_some(sin + second + j, left);
    const f32v sin_a = rope.full ? sin_first : -sin_first;
    const f32v from_a = a * cos_a, from_b = b * cos_b;
    store_some(rounded<T>(fma(b, sin_a, round ? rounded<T>(from_a) : from_a)), x + j, left);
    store_some(rounded<T>(fma(a, sin_b, round ? rounded<T>(from_b) : from_b)), x + half + j, left);
  }
}

/// Neighbouring pairs.
template <class T, class C>
void rotate_pairs(const RopeTable& rope, const C* cos, const C* sin, float* x) {
  constexpr bool round = sizeof(T) == sizeof(C);
  for (int j = 0; j < rope.dim / 2; ++j) {
    const int first = rope.full ? 2 * j : j, second = rope.full ? 2 * j + 1 : j;
    const float a = x[2 * j], b = x[2 * j + 1];
    const float sin_a = rope.full ? to_f32(sin[first]) : -to_f32(sin[first]);
    const float from_a = a * to_f32(cos[first]), from_b = b * to_f32(cos[second]);
    x[2 * j] = rounded_one<T>((round ? rounded_one<T>(from_a) : from_a) + b * sin_a);
    x[2 * j + 1] = rounded_one<T>((round ? rounded_one<T>(from_b) : from_b) + a * to_f32(sin[second]));
  }
}

template <class T, class C>
void rotate_by(const RopeTable& rope, int64_t token, float* x) {
  const int64_t row = (rope.positions == nullptr ? token : rope.positions[token]) * rope.stride;
  const C* cos = static_cast<const C*>(rope.cos) + row;
  const C* sin = static_cast<const C*>(rope.sin) + row;
  if (rope.interleaved) {
    rotate_pairs<T, C>(rope, cos, sin, x + rope.begin);
  } else {
    rotate_halves<T, C>(rope, cos, sin, x + rope.begin);
  }
}

/// from: one head of `dim` numbers -> x, normalised and rotated.
template <class T>
void make_head(const RopeCall& call, const HeadNorm& norm, int64_t token, const T* from, int dim, float* x) {
  for (int i = 0; i < dim; i += N) store_some(load_some(from + i, dim - i), x + i, dim - i);
  if (norm.weight != nullptr) {
    if (norm.type == DType::f32) {
      normalise<T, float>(norm, call.eps, x);
    } else {
      normalise<T, T>(norm, call.eps, x);
    }
  }
  if (call.rope.cos != nullptr) {
    if (call.rope.type == DType::f32) {
      rotate_by<T, float>(call.rope, token, x);
    } else {
      rotate_by<T, T>(call.rope, token, x);
    }
  }
}

ML_INLINE float largest_magnitude(const float* x, int dim) {
  f32v top = f32v::zero();
  for (int i = 0; i < dim; i += N) top = max(top, abs(load_some(x + i, dim - i)));
  return max(top);
}

/// An 8-bit float: bits of mantissa, bias of the exponent, largest number, as in to_fp8_bits of base/types.h.
template <class S>
struct Narrow {};
template <>
struct Narrow<fp8_e4m3> {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr float kLargest = 448.0f;
};
template <>
struct Narrow<fp8_e5m2> {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr float kLargest = 57344.0f;
};
template <>
struct Narrow<int8_t> {
  static constexpr float kLargest = 127.0f;
};

/// to_fp8_bits without a branch and with whole numbers' comparisons only: compilers make vectors of it.
template <class S>
void narrow_row(const float* x, int dim, S* out) {
  constexpr uint32_t kDrop = 23 - Narrow<S>::kMantissa, kRebias = uint32_t(127 - Narrow<S>::kBias) << 23;
  constexpr uint32_t kNormal = uint32_t(128 - Narrow<S>::kBias) << 23;
  constexpr uint32_t kMagic = kNormal + (kDrop << 23);
  const uint32_t largest = bit_cast<uint32_t>(Narrow<S>::kLargest);
  for (int i = 0; i < dim; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(x[i]), magnitude = bits & 0x7fffffffu;
    const uint32_t inside = magnitude < largest ? magnitude : largest;
    const uint32_t normal = (inside + (1u << (kDrop - 1)) - 1u + ((inside >> kDrop) & 1u) - kRebias) >> kDrop;
    const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(inside) + bit_cast<float>(kMagic)) - kMagic;
    const uint32_t number = inside < kNormal ? tiny : normal;
    out[i].bits = uint8_t(((bits >> 24) & 0x80u) | (magnitude > 0x7f800000u ? 0x7fu : number));
  }
}

void narrow_row(const float* x, int dim, int8_t* out) {
  for (int i = 0; i < dim; ++i) out[i] = int8_t(int32_t(x[i]));
}

/// x / scale in a narrow type; with an inline scale the row's own, which takes its largest number to the type's
/// largest.
template <class S>
void put_scaled(const KvView& kv, const float* scale, int head, const float* x, int dim, char* to) {
  float factor = scale == nullptr ? 1.0f : scale[head];
  if (kv.inline_scales) {
    const float top = largest_magnitude(x, dim);
    factor = top > 0.0f ? top / Narrow<S>::kLargest : 1.0f;
    __builtin_memcpy(to + dim * sizeof(S), &factor, sizeof(float));
  }
  const f32v inverse = f32v::set(1.0f / factor), largest = f32v::set(Narrow<S>::kLargest);
  float scaled[kMostHeadDim];
  for (int i = 0; i < dim; i += N) {
    f32v y = load_some(x + i, dim - i) * inverse;
    if constexpr (std::is_same_v<S, int8_t>) {
      y = round(min(max(y, -largest), largest));
    }
    store_some(y, scaled + i, dim - i);
  }
  narrow_row(scaled, dim, reinterpret_cast<S*>(to));
}

template <class S>
void put_plain(const float* x, int dim, char* to) {
  S* out = reinterpret_cast<S*>(to);
  for (int i = 0; i < dim; i += N) store_some(load_some(x + i, dim - i), out + i, dim - i);
}

void put_row(const KvView& kv, const float* scale, int head, const float* x, int dim, char* to) {
  switch (kv.type) {
    case DType::bf16:
      return put_plain<bf16>(x, dim, to);
    case DType::f16:
      return put_plain<fp16>(x, dim, to);
    case DType::fp8_e4m3:
      return put_scaled<fp8_e4m3>(kv, scale, head, x, dim, to);
    case DType::fp8_e5m2:
      return put_scaled<fp8_e5m2>(kv, scale, head, x, dim, to);
    case DType::i8:
      return put_scaled<int8_t>(kv, scale, head, x, dim, to);
    default:
      return put_plain<float>(x, dim, to);
  }
}

template <class T>
void run_as(const RopeCall& call, int64_t first, int64_t last) {
  const KvView& kv = call.kv;
  float x[kMostHeadDim];
  for (int64_t token = first; token < last; ++token) {
    for (int head = 0; call.q != nullptr && head < call.q_heads; ++head) {
      const int64_t at = int64_t{head} * call.head_dim;
      make_head(call, call.q_norm, token, static_cast<const T*>(call.q) + token * call.q_stride + at, call.head_dim, x);
      T* to = static_cast<T*>(call.q_out) + token * call.q_out_stride + at;
      for (int i = 0; i < call.head_dim; i += N)
        store_some(load_some(x + i, call.head_dim - i), to + i, call.head_dim - i);
    }
    char* place = kv.base + call.store_page[token] * kv.page_stride + call.store_offset[token] * kv.token_stride;
    for (int head = 0; head < kv.heads; ++head) {
      char* to = place + head * kv.head_stride;
      const int64_t key = token * call.k_stride + int64_t{head} * kv.key_dim;
      make_head(call, call.k_norm, token, static_cast<const T*>(call.k) + key, kv.key_dim, x);
      put_row(kv, kv.key_scale, head, x, kv.key_dim, to + kv.key_offset);
      if (call.v == nullptr) continue;
      const T* value = static_cast<const T*>(call.v) + token * call.v_stride + int64_t{head} * kv.value_dim;
      for (int i = 0; i < kv.value_dim; i += N)
        store_some(load_some(value + i, kv.value_dim - i), x + i, kv.value_dim - i);
      put_row(kv, kv.value_scale, head, x, kv.value_dim, to + kv.value_offset);
    }
  }
}

void run(const RopeCall& call, int64_t first, int64_t last) {
  switch (call.dtype) {
    case DType::bf16:
      return run_as<bf16>(call, first, last);
    case DType::f16:
      return run_as<fp16>(call, first, last);
    default:
      return run_as<float>(call, first, last);
  }
}

}  // namespace

const RopeKernels rope_table = {run};

}  // namespace ml::ML_ISA
