// Element types: the narrow floats as structs of bits, so that overloads pick the conversion.
#pragma once

#include <cstdint>
#include <cstring>

// Functions of base/ are compiled into files with different -m flags. Were they ordinary inline functions, the linker
// could keep the AVX-512 copy for everybody; always_inline leaves nothing to merge.
#define ML_INLINE inline __attribute__((always_inline))

namespace ml {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8_e4m3 {  // the "fn" form: no infinities, 0x7f and 0xff are NaN
  uint8_t bits;
};
struct fp8_e5m2 {
  uint8_t bits;
};

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, fp8_e4m3 = 3, fp8_e5m2 = 4, i8 = 5, i32 = 6, i64 = 7 };

ML_INLINE int64_t bytes_of(DType type) {
  switch (type) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i64:
      return 8;
    default:
      return 1;
  }
}

template <class To, class From>
ML_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

ML_INLINE float to_f32(float v) { return v; }
ML_INLINE float to_f32(int8_t v) { return float(v); }
ML_INLINE float to_f32(bf16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }

ML_INLINE float to_f32(fp16 v) {
  // Move the bits to where float32 has them, then correct the exponent bias (15 -> 127) by a multiplication, which also
  // normalises the subnormals. Infinity and NaN get their exponent by hand.
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
  const uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  const float magnitude = bit_cast<float>(rest << 13) * bit_cast<float>(uint32_t(127 + 112) << 23);
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

ML_INLINE float to_f32(fp8_e4m3 v) {
  if ((v.bits & 0x7f) == 0x7f) return bit_cast<float>(uint32_t{0x7fc00000u});
  const uint32_t bits = (uint32_t(v.bits & 0x80) << 24) | (uint32_t(v.bits & 0x7f) << 20);
  return bit_cast<float>(bits) * bit_cast<float>(uint32_t(127 + 120) << 23);
}

ML_INLINE float to_f32(fp8_e5m2 v) { return to_f32(fp16{uint16_t(v.bits << 8)}); }

ML_INLINE void from_f32(float v, float* out) { *out = v; }

ML_INLINE void from_f32(float v, bf16* out) {  // round to nearest even
  const uint32_t bits = bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t((bits >> 16) | 0x40u);
  } else {
    out->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

ML_INLINE void from_f32(float v, fp16* out) {  // round to nearest even
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the rounded value into the low mantissa bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = uint16_t(sign | ((rounded - 0x38000000u) >> 13));
  }
}

/// Saturating, round to nearest even. `mantissa` bits, exponent `bias`, largest finite value `largest`.
ML_INLINE uint8_t to_fp8_bits(float v, int mantissa, int bias, float largest, uint8_t nan) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint8_t sign = uint8_t((bits >> 24) & 0x80u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint8_t(sign | nan);
  if (bit_cast<float>(magnitude) > largest) magnitude = bit_cast<uint32_t>(largest);
  const int drop = 23 - mantissa;
  const uint32_t smallest_normal = uint32_t(128 - bias) << 23;
  if (magnitude < smallest_normal) {
    // The unit in the last place of the subnormals, brought into the float32 mantissa by adding 2^23 of that unit.
    const float magic = bit_cast<float>(uint32_t(128 - bias + drop) << 23);
    return uint8_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + magic) - bit_cast<uint32_t>(magic)));
  }
  const uint32_t rounded = magnitude + (1u << (drop - 1)) - 1u + ((magnitude >> drop) & 1u);
  return uint8_t(sign | ((rounded - (uint32_t(127 - bias) << 23)) >> drop));
}

ML_INLINE void from_f32(float v, fp8_e4m3* out) { out->bits = to_fp8_bits(v, 3, 7, 448.0f, 0x7f); }
ML_INLINE void from_f32(float v, fp8_e5m2* out) { out->bits = to_fp8_bits(v, 2, 15, 57344.0f, 0x7f); }

}  // namespace ml
