// Attention from queries over keys and values that lie in pages.
//
// The keys of a sequence are cut into blocks of kBlockTokens by absolute position. A query's result over one block is
// (m, l, o): the largest score, the sum of 2^(score - m), and the values weighted with it. Blocks are merged in order.
// Every number has one fixed chain of operations in absolute positions, so a query's bits depend neither on the chunk
// it came in, nor on the batch, the thread count, or on who shares its pages.
#pragma once

#include <cstdint>

#include "base/types.h"
#include "ops/attention_plan.h"
#include "ops/kv_view.h"
#include "ops/table.h"

namespace ml {

/// One call. q: [T, H, key_dim], out: [T, H, value_dim], rows of the plan in order.
struct AttendCall {
  KvView kv;
  const void* q;
  void* out;
  DType dtype;       // of q and out: f32, bf16 or f16
  int64_t q_stride;  // elements from token to token
  int64_t out_stride;
  int32_t q_heads;
  int32_t window;  // a token sees itself and window - 1 before it; 0: all before it
  float scale;
  float softcap;       // 0: none
  const float* sinks;  // [H] scores of a key that has no value, or null
  // From the plan, by `attend`:
  const AttendSegment* segments;
  int64_t most_queries;
  float* partials;  // per row that is merged: [blocks, H, value_dim + 2], the values, then top and sum (see RowState)
};

/// What a kernel file offers. `scratch` is uninitialised memory of scratch_bytes, 64-byte aligned, for this call alone.
/// A call of `run` does at most `heads` of them.
struct AttentionTable {
  int64_t (*scratch_bytes)(const AttendCall&, int heads);
  void (*run)(const AttendCall&, const AttendItem&, int head, int head_end, void* scratch);
  void (*merge)(const AttendCall&, const AttendMerge&, int head, void* scratch);
};

/// Attends on the thread pool. Throws std::invalid_argument when the call does not fit the plan.
void attend(AttendCall call, const AttendPlan& plan);

}  // namespace ml

ML_DECLARE_TABLE(AttentionTable, attention)
