// What the ops of a program see of one forward.
#pragma once

#include <cstdint>
#include <vector>

#include "base/arena.h"
#include "base/span.h"
#include "base/types.h"
#include "ops/attention.h"
#include "ops/attention_plan.h"

namespace ml {

/// The numbers of a model that all its layers share.
struct ModelShape {
  DType dtype;  // of the values between ops
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t value_dim = 0;  // of a latent, whose first numbers are its value; 0: values lie beside the keys

  int32_t result_dim() const { return value_dim == 0 ? head_dim : value_dim; }  // numbers that a head of attention gives
};

constexpr int64_t kStrideMore = 64;  // bytes: the most that stride_of adds

/// Elements from one row of a value to the next. Rows a multiple of 4 KB apart all fall on the same few places of the L1
/// cache, and the twelve that a product reads at a time push each other out (a tenth of its speed): they get a line more.
inline int64_t stride_of(int64_t columns, DType type) {
  return columns * bytes_of(type) % 4096 == 0 ? columns + kStrideMore / bytes_of(type) : columns;
}

/// The pool of pages, [P, L, 2, K, p, D], or of latents [P, L, p, D].
struct KvPool {
  char* base = nullptr;
  int64_t pages = 0;
  int32_t layers = 0;
  int32_t page_tokens = 0;
  DType type = DType::f32;

  KvView layer(int32_t index, const ModelShape& shape) const;
};

/// One forward as the engine describes it. Row i computes positions [starts[i], starts[i] + lengths[i]) of the sequence
/// in slot slots[i], whose pages are row slots[i] of the page table.
struct Batch {
  Span<const int64_t> ids;  // [T], in row order
  Span<const int64_t> slots;
  Span<const int64_t> starts;
  Span<const int64_t> lengths;
  Span<const int64_t> kept;  // the tokens whose hidden states are wanted
  const int32_t* page_table;
  int64_t page_table_rows;
  int64_t page_table_columns;
  const void* given = nullptr;  // [T, M], dense: the hidden states, where another program has computed the first layers
};

/// Tells other threads how far a running forward is: `word` becomes base + the number of layers whose keys and values
/// are in the pool, every `every` layers (0: never), and `event` (an eventfd) is raised.
struct Report {
  int64_t* word = nullptr;
  int event = -1;
  int32_t every = 0;
  int64_t base = 0;

  void stored(int32_t layers) const;
};

/// Memory of a value: `row_bytes` per token of the batch, or per kept token.
struct ValueBuffer {
  int64_t row_bytes;
  bool kept;
};

/// The batch in the form that kernels read, and the memory of all values. Reused from forward to forward.
class Step {
 public:
  explicit Step(const ModelShape& shape) : shape(shape) {}

  /// Throws std::invalid_argument or std::out_of_range when the batch contradicts itself or the pool.
  void begin(const Batch& batch, const std::vector<ValueBuffer>& buffers, const std::vector<int32_t>& windows);

  void* at(int buffer) const { return memory_ + offsets_[size_t(buffer)]; }
  int64_t stride(int64_t columns) const { return stride_of(columns, shape.dtype); }
  int64_t rows_of(int buffer) const { return sizes_[size_t(buffer)]; }
  int64_t tokens() const { return int64_t(ids.size()); }
  int64_t last_position() const { return last_position_; }  // the largest
  int64_t kept_count() const { return int64_t(kept.size()); }
  const AttendPlan& plan(int index) const { return plans_[size_t(index)]; }

  const ModelShape shape;
  KvPool pool;
  Report report;
  std::vector<int64_t> ids;           // [T]
  std::vector<int32_t> positions;     // [T]
  std::vector<int32_t> store_page;    // [T]
  std::vector<int32_t> store_offset;  // [T]
  std::vector<int32_t> kept;          // [N]
  const void* given = nullptr;        // see Batch

 private:
  void check(const Batch& batch) const;
  void lay_out(const Batch& batch);
  void plan_attention(const std::vector<int32_t>& windows);
  void place(const std::vector<ValueBuffer>& buffers);

  std::vector<int32_t> starts_, lengths_;  // [B]
  std::vector<int32_t> pages_;             // [B, page_columns_]
  int64_t page_columns_ = 0;
  int64_t last_position_ = 0;
  std::vector<AttendPlan> plans_;
  std::vector<int64_t> offsets_, sizes_;
  Buffer arena_;
  char* memory_ = nullptr;
};

}  // namespace ml
