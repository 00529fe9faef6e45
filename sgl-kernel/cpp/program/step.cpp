#include "program/step.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/pool.h"

namespace ml {

namespace {

constexpr int64_t kLine = 64;

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

}  // namespace

KvView KvPool::layer(int32_t index, const ModelShape& shape) const {
  KvView view{};
  const bool inline_scales = type == DType::i8;
  const int64_t token_bytes = shape.head_dim * bytes_of(type) + (inline_scales ? int64_t{sizeof(float)} : 0);
  const int64_t side_bytes = shape.kv_heads * page_tokens * token_bytes;  // the keys, or the values, of one layer
  view.base = base;
  const bool latent = shape.value_dim != 0;
  view.page_stride = layers * (latent ? 1 : 2) * side_bytes;
  view.key_offset = index * (latent ? 1 : 2) * side_bytes;
  view.value_offset = view.key_offset + (latent ? 0 : side_bytes);
  view.head_stride = page_tokens * token_bytes;
  view.token_stride = token_bytes;
  view.heads = shape.kv_heads;
  view.page_tokens = page_tokens;
  view.key_dim = shape.head_dim;
  view.value_dim = shape.result_dim();
  view.type = type;
  view.inline_scales = inline_scales;
  return view;
}

void Report::stored(int32_t layers) const {
  if (every == 0 || layers % every != 0) return;
  __atomic_store_n(word, base + layers, __ATOMIC_RELEASE);
  const uint64_t one = 1;
  // An eventfd takes eight bytes or, when its counter is about to overflow, none: then it is readable anyway.
  [[maybe_unused]] const ssize_t written = write(event, &one, sizeof one);
}

void Step::begin(const Batch& batch, const std::vector<ValueBuffer>& buffers, const std::vector<int32_t>& windows) {
  check(batch);
  lay_out(batch);
  plan_attention(windows);
  place(buffers);
}

void Step::check(const Batch& batch) const {
  require(pool.base != nullptr, "the program has no pool yet");
  const int64_t rows = batch.slots.size;
  require(batch.starts.size == rows && batch.lengths.size == rows, "slots, starts and lengths differ in length");
  int64_t tokens = 0;
  for (int64_t i = 0; i < rows; ++i) {
    require(batch.lengths[i] > 0 && batch.starts[i] >= 0, "a row without tokens, or before the first position");
    require(batch.slots[i] >= 0 && batch.slots[i] < batch.page_table_rows, "no such slot");
    require(batch.starts[i] + batch.lengths[i] <= batch.page_table_columns * pool.page_tokens,
            "a row goes beyond its page table");
    tokens += batch.lengths[i];
  }
  require(tokens == batch.ids.size, "the lengths do not add up to the ids");
  for (int64_t token : batch.kept) require(token >= 0 && token < tokens, "no such token to keep");
}

void Step::lay_out(const Batch& batch) {
  const int64_t rows = batch.slots.size, page = pool.page_tokens;
  ids.assign(batch.ids.begin(), batch.ids.end());
  kept.assign(batch.kept.begin(), batch.kept.end());
  given = batch.given;
  starts_.assign(batch.starts.begin(), batch.starts.end());
  lengths_.assign(batch.lengths.begin(), batch.lengths.end());
  positions.resize(ids.size());
  store_page.resize(ids.size());
  store_offset.resize(ids.size());
  last_position_ = 0;
  for (int64_t i = 0; i < rows; ++i) last_position_ = std::max(last_position_, batch.starts[i] + batch.lengths[i] - 1);
  page_columns_ = last_position_ / page + 1;
  pages_.assign(size_t(rows * page_columns_), 0);
  size_t token = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t* table = batch.page_table + batch.slots[i] * batch.page_table_columns;
    const int64_t end = batch.starts[i] + batch.lengths[i], used = ceil_div(end, page);
    for (int64_t k = 0; k < used; ++k) {
      if (table[k] < 0 || table[k] >= pool.pages) throw std::out_of_range("a page table names no page of the pool");
      pages_[size_t(i * page_columns_ + k)] = table[k];
    }
    for (int64_t position = batch.starts[i]; position < end; ++position, ++token) {
      positions[token] = int32_t(position);
      store_page[token] = table[position / page];
      store_offset[token] = int32_t(position % page);
    }
  }
}

void Step::plan_attention(const std::vector<int32_t>& windows) {
  const AttendRows rows{pages_.data(), page_columns_, starts_.data(), lengths_.data(), int32_t(starts_.size())};
  plans_.resize(windows.size());
  for (size_t i = 0; i < windows.size(); ++i) {
    plans_[i].build(rows, {shape.kv_heads, shape.heads / shape.kv_heads, pool.page_tokens, shape.result_dim(),
                           windows[i], threads()});
  }
}

void Step::place(const std::vector<ValueBuffer>& buffers) {
  // Packed by the true number of tokens: a decode step touches little memory, whatever was computed before.
  offsets_.resize(buffers.size());
  sizes_.resize(buffers.size());
  int64_t bytes = 0;
  for (size_t i = 0; i < buffers.size(); ++i) {
    sizes_[i] = buffers[i].kept ? kept_count() : tokens();
    offsets_[i] = bytes;
    bytes += round_up(buffers[i].row_bytes * sizes_[i], kLine);
  }
  if (bytes > arena_.bytes()) {
    arena_ = Buffer();  // before the larger one is taken
    arena_ = Buffer(std::max(round_up(bytes, kHugePage), int64_t{4} << 20));
  }
  memory_ = static_cast<char*>(arena_.data());
}

}  // namespace ml
