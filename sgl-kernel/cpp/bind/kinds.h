// The kinds of weights by name.
#pragma once

#include <string>

#include "bind/arrays.h"
#include "ops/quant.h"

namespace ml::bind {

inline WeightKind dense_kind(const std::string& name) {
  if (name == "f32") return WeightKind::f32;
  if (name == "bf16") return WeightKind::bf16;
  refuse("kind: expected f32 or bf16, got " + name);
}

inline QuantForm quant_form(const std::string& kind, int64_t group, int64_t lead = 0, int64_t segments = 1) {
  if (group < 1) refuse("group: must be positive");
  if (lead < 0 || lead >= group) refuse("lead: must be less than a group");
  if (segments < 1) refuse("segments: must be 1, 2, 4 or 8");
  if (kind == "int8") return {WeightKind::int8, DType::i8, group, lead, segments};
  if (kind == "int4") return {WeightKind::int4, DType::i8, group, lead, segments};
  if (kind == "w8a8") return {WeightKind::w8a8, DType::i8, group, lead, segments};
  if (kind == "fp8_e4m3") return {WeightKind::fp8, DType::fp8_e4m3, group, lead, segments};
  if (kind == "fp8_e5m2") return {WeightKind::fp8, DType::fp8_e5m2, group, lead, segments};
  refuse("kind: expected int8, int4, w8a8, fp8_e4m3 or fp8_e5m2, got " + kind);
}

inline bool is_dense(WeightKind kind) { return kind == WeightKind::f32 || kind == WeightKind::bf16; }

/// The name that the functions above understand.
inline std::string kind_name(const PackedWeight& w) {
  constexpr const char* kNames[] = {"f32", "bf16", "int8", "int4", "w8a8"};
  if (w.kind != WeightKind::fp8) return kNames[int(w.kind)];
  return quant_segments(w)[0].codes == DType::fp8_e4m3 ? "fp8_e4m3" : "fp8_e5m2";
}

}  // namespace ml::bind
