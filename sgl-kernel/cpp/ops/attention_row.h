// What every task of attention does with one query row: its running result, what it sees, and the result's way out.
// Included from .inc.cpp only.
#pragma once

#include "base/span.h"
#include "ops/attention.h"
#include "ops/attention_tile.h"

namespace ml::ML_ISA {

/// Running result of one query row: largest scaled score and sum of weights so far.
struct RowState {
  float top, sum;
};

/// Takes a block's (top, sum) into each state; merge[i] says what that means for the values. count <= kTileRows.
ML_INLINE void merge_states(const RowState* block, int count, RowState* states, RowMerge* merge) {
  static_assert(2 * kTileRows <= kLanes, "one vector holds the exponents of a tile");
  float exponents[kLanes] = {}, factors[kLanes];
  for (int i = 0; i < count; ++i) {
    const float top = states[i].top > block[i].top ? states[i].top : block[i].top;
    exponents[2 * i] = states[i].top - top;
    exponents[2 * i + 1] = block[i].top - top;
    states[i].top = top;
  }
  exp2(f32v::load(exponents)).store(factors);
  for (int i = 0; i < count; ++i) {
    merge[i] = {factors[2 * i], factors[2 * i + 1]};
    states[i].sum = states[i].sum * merge[i].keep + block[i].sum * merge[i].add;
  }
}

constexpr RowState kNothing = {kHidden, 0.0f};

/// Writes values / sum in the call's dtype. head: q head. values: at least value_dim floats.
template <class Q>
ML_INLINE void write_row(const AttendCall& call, int64_t token, int q_head, RowState state, const float* values) {
  float factor;
  if (call.sinks != nullptr) {
    const RowState sink = {call.sinks[q_head] * kLog2e, 1.0f};
    RowMerge merge;
    merge_states(&sink, 1, &state, &merge);
    factor = merge.keep / state.sum;
  } else {
    factor = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
  }
  if (call.kv.value_scale != nullptr) factor *= call.kv.value_scale[q_head / (call.q_heads / call.kv.heads)];
  Q* to = static_cast<Q*>(call.out) + token * call.out_stride + int64_t{q_head} * call.kv.value_dim;
  const f32v by = f32v::set(factor);
  int at = 0;
  for (; at + kLanes <= call.kv.value_dim; at += kLanes) (f32v::load(values + at) * by).store(to + at);
  if (at < call.kv.value_dim) (f32v::load(values + at) * by).store(to + at, call.kv.value_dim - at);
}

inline void write_row_as(const AttendCall& call, int64_t token, int q_head, RowState state, const float* values) {
  switch (call.dtype) {
    case DType::bf16:
      return write_row<bf16>(call, token, q_head, state, values);
    case DType::f16:
      return write_row<fp16>(call, token, q_head, state, values);
    default:
      return write_row<float>(call, token, q_head, state, values);
  }
}

/// What a query at `position` sees of a block; nothing when low >= high.
ML_INLINE RowRange range_in(const AttendCall& call, int position, int block) {
  const int last = position - block * kBlockTokens;
  const int low = call.window == 0 ? 0 : last + 1 - call.window;
  return {low > 0 ? low : 0, last + 1 < kBlockTokens ? last + 1 : kBlockTokens};
}

/// The rule of one kv head. key_scale, value_scale: [kBlockTokens] memory for the scales of a block's rows.
inline ScoreRule rule_of(const AttendCall& call, int head, const float* key_scale, const float* value_scale) {
  const bool capped = call.softcap != 0.0f;
  const float scale = call.scale * (call.kv.key_scale != nullptr ? call.kv.key_scale[head] : 1.0f);
  return {capped ? kLog2e : scale * kLog2e, call.softcap, capped ? scale / call.softcap : 0.0f,
          call.kv.inline_scales ? key_scale : nullptr, call.kv.inline_scales ? value_scale : nullptr};
}

/// Leaves a row's values over one block, and their (top, sum), for the merge.
inline void leave_row(const AttendCall& call, const AttendSegment& segment, int block, int q_head, RowState state,
                      const float* values) {
  const int64_t place = int64_t{block - segment.first_block} * call.q_heads + q_head;
  float* to = call.partials + segment.partials + place * (call.kv.value_dim + 2);
  __builtin_memcpy(to, values, size_t(call.kv.value_dim) * sizeof(float));
  to[call.kv.value_dim] = state.top;
  to[call.kv.value_dim + 1] = state.sum;
}

/// f(the numbers of one query in their type).
template <class F>
ML_INLINE void with_query(const AttendCall& call, int64_t token, int q_head, F f) {
  const int64_t at = token * call.q_stride + int64_t{q_head} * call.kv.key_dim;
  switch (call.dtype) {
    case DType::bf16:
      return f(static_cast<const bf16*>(call.q) + at);
    case DType::f16:
      return f(static_cast<const fp16*>(call.q) + at);
    default:
      return f(static_cast<const float*>(call.q) + at);
  }
}

}  // namespace ml::ML_ISA
