#include "ops/moe.h"

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

constexpr int64_t kLanes = f32v::N;
constexpr float kNever = -__builtin_inff();
constexpr float kTiny = 1e-20f;  // sigmoids may all be zero

/// The first index of the largest of n values.
int64_t first_best(const float* values, int64_t n) {
  float best = kNever;
  int64_t at = 0;
  if (n >= kLanes) {
    f32v largest = f32v::load(values);
    for (int64_t i = kLanes; i + kLanes <= n; i += kLanes) largest = max(f32v::load(values + i), largest);
    best = max(largest);
  }
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) best = values[i] > best ? values[i] : best;
  while (at + 1 < n && values[at] != best) ++at;
  return at;
}

/// scores[n], padded to whole vectors in memory.
void score(const float* logits, int64_t n, bool sigmoids, float* scores) {
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < n; ++i) scores[i] = logits[i];
  for (int64_t i = n; i < padded; ++i) scores[i] = kNever;
  if (sigmoids) {
    for (int64_t i = 0; i < padded; i += kLanes) sigmoid(f32v::load(scores + i)).store(scores + i);
    return;
  }
  const f32v peak = f32v::set(scores[first_best(scores, n)]);
  f32v mass = f32v::zero();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const f32v e = exp(f32v::load(scores + i) - peak);
    e.store(scores + i);
    mass = mass + e;
  }
  const f32v total = f32v::set(sum(mass));
  for (int64_t i = 0; i < padded; i += kLanes) (f32v::load(scores + i) / total).store(scores + i);
}

/// Sets to -inf what lies outside the best groups. best: experts that make a group good, 1 or 2.
void keep_best_groups(float* choice, int64_t n, const Gating& gating, int best) {
  const int64_t members = n / gating.groups;
  float good[kMaxExperts];
  for (int64_t g = 0; g < gating.groups; ++g) {
    float first = kNever, second = kNever;
    for (int64_t i = g * members; i < (g + 1) * members; ++i) {
      if (choice[i] > first) {
        second = first;
        first = choice[i];
      } else if (choice[i] > second) {
        second = choice[i];
      }
    }
    good[g] = best == 2 ? first + second : first;
  }
  bool kept[kMaxExperts] = {};
  for (int64_t i = 0; i < gating.groups_kept; ++i) {
    const int64_t g = first_best(good, gating.groups);
    kept[g] = true;
    good[g] = kNever;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (!kept[i / members]) choice[i] = kNever;
  }
}

void top_experts(const GatingRows& op, int64_t first, int64_t last) {
  const Gating& gating = *op.gating;
  float scores[kMaxExperts + kLanes], choice[kMaxExperts];
  for (int64_t row = first; row < last; ++row) {
    score(op.logits + row * op.experts, op.experts, gating.sigmoid, scores);
    for (int64_t i = 0; i < op.experts; ++i) choice[i] = op.bias == nullptr ? scores[i] : scores[i] + op.bias[i];
    if (gating.groups > 1) keep_best_groups(choice, op.experts, gating, op.bias == nullptr ? 1 : 2);

    float* weights = op.weights + row * gating.experts_per_token;
    int32_t* chosen = op.chosen + row * gating.experts_per_token;
    float total = 0.0f;
    for (int64_t j = 0; j < gating.experts_per_token; ++j) {
      const int64_t expert = first_best(choice, op.experts);
      choice[expert] = kNever;
      chosen[j] = int32_t(expert);
      weights[j] = scores[expert];
      total += scores[expert];
    }
    for (int64_t j = 0; j < gating.experts_per_token; ++j) {
      weights[j] = (gating.normalise ? weights[j] / (total + kTiny) : weights[j]) * gating.scale;
    }
  }
}

template <class T>
ML_INLINE f32v load(const void* base, int64_t at, int count) {
  const T* from = static_cast<const T*>(base) + at;
  return count == kLanes ? f32v::load(from) : f32v::load(from, count);
}

template <class T>
void combine_rows(const Combine& op, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* weights = op.weights + row * op.per_token;
    const void* const* z = op.z + row * op.per_token;
    f32v shared_weight = f32v::set(1.0f);
    if (op.shared_logits != nullptr) shared_weight = sigmoid(f32v::set(op.shared_logits[row]));
    for (int64_t at = 0; at < op.columns; at += kLanes) {
      const int count = op.columns - at < kLanes ? int(op.columns - at) : int(kLanes);
      f32v total = f32v::zero();
      for (int64_t j = 0; j < op.per_token; ++j) {
        total = fma(f32v::set(weights[j]), load<T>(z[j], at, count), total);
      }
      if (op.shared != nullptr) total = fma(shared_weight, load<T>(op.shared, row * op.columns + at, count), total);
      if (op.residual != nullptr) total = total + load<T>(op.residual, row * op.ld_residual + at, count);
      T* y = static_cast<T*>(op.y) + row * op.ldy + at;
      if (count == kLanes) {
        total.store(y);
      } else {
        total.store(y, count);
      }
    }
  }
}

void combine(const Combine& op, int64_t first, int64_t last) {
  if (op.type == DType::f32) return combine_rows<float>(op, first, last);
  if (op.type == DType::bf16) return combine_rows<bf16>(op, first, last);
  combine_rows<fp16>(op, first, last);
}

}  // namespace

const MoeOps moe_table = {top_experts, combine};

}  // namespace ml::ML_ISA
