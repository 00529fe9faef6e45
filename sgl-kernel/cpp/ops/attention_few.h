// One task of attention with few queries: those of one segment, some kv heads, over a range of blocks. Included from
// .inc.cpp only.
//
// A page holds the keys of all heads of a layer side by side, and behind them the values. So the keys of a block are
// walked span by span (the tokens of one page) and in each span head by head: reads run through memory in order. The
// values follow in the same way once the softmax of the block is known.
#pragma once

#include "ops/attention_direct.h"
#include "ops/attention_row.h"

namespace ml::ML_ISA {

#if defined(ML_ISA_AVX512)

constexpr int kAhead = 2;            // visits of one span and head that memory needs to answer
constexpr int kMostDirectRows = 16;  // query rows of a kv head; with more, packing pays

/// Whether FewRun can do the item.
inline bool few_rows(const AttendCall& call, const AttendItem& item) {
  const int64_t rows = int64_t{call.segments[item.segment].count} * (call.q_heads / call.kv.heads);
  return item.segment_end - item.segment == 1 && rows <= kMostDirectRows;
}

/// Where a task's arrays lie in its scratch memory; rows of all its heads one after the other.
struct FewMemory {
  int64_t bytes = 0;
  int64_t units, dims;
  uint32_t *queries, *weights;
  float *scores, *sums, *outputs, *key_scale, *value_scale;  // value_scale: of the span at hand
  RowState *states, *found;
  const char** keys;  // [kBlockTokens] of head 0; null: nobody looks there
  char* copies;       // [span] rows

  static int64_t row_bytes(const AttendCall& call) {
    const int64_t longer = call.kv.value_dim > call.kv.key_dim ? call.kv.value_dim : call.kv.key_dim;
    return round_up(longer * bytes_of(call.kv.type) + int64_t{sizeof(float)}, 64);
  }

  FewMemory(const AttendCall& call, int heads, int64_t rows_per_head, char* base) {
    const int64_t rows = heads * rows_per_head;
    units = ceil_div(call.kv.key_dim, 16);
    dims = round_up(call.kv.value_dim, kHalf);
    take(base, queries, rows * units * kLanes);
    take(base, weights, rows * kBlockTokens / 2);
    take(base, scores, rows * kBlockTokens);
    take(base, sums, rows * dims);
    take(base, outputs, rows * dims);
    take(base, key_scale, int64_t{heads} * kBlockTokens);
    take(base, value_scale, kBlockTokens);
    take(base, states, rows);
    take(base, found, rows);
    take(base, keys, kBlockTokens);
    take(base, copies, kBlockTokens * row_bytes(call));
  }

 private:
  template <class T>
  ML_INLINE void take(char* base, T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * int64_t{sizeof(T)}, 64);
  }
};

class FewRun {
 public:
  FewRun(const AttendCall& call, const AttendItem& item, int head, int head_end, void* scratch)
      : call_(call),
        kv_(call.kv),
        item_(item),
        segment_(call.segments[item.segment]),
        head_(head),
        heads_(head_end - head),
        group_(call.q_heads / call.kv.heads),
        rows_(segment_.count * group_),
        direct_(direct_of(call.kv.type)),
        memory_(call, heads_, rows_, static_cast<char*>(scratch)) {
    // Tokens of one page; a page that does not hold whole vectors of keys is walked vector by vector.
    span_ = kv_.page_tokens % kBlockTokens == 0 ? kBlockTokens : kv_.page_tokens;
    if (span_ % kLanes != 0 || kBlockTokens % span_ != 0) span_ = kLanes;
  }

  void run() {
    start();
    enter(item_.block);
    for (int block = item_.block; block < item_.block_end; ++block) {
      if (seen_.low < seen_.high) {
        walk(Side::keys, block);
        soften_rows(block);
        walk(Side::values, block);
        take_in(block);
      }
      enter(block + 1);
    }
    if (item_.whole) finish();
  }

 private:
  enum class Side { keys, values };

  int position(int row) const { return segment_.start + row / group_; }

  /// The q head of a row of kv head head_ + h.
  int q_head(int h, int row) const { return (head_ + h) * group_ + row % group_; }

  void start() {
    for (int h = 0; h < heads_; ++h) {
      for (int row = 0; row < rows_; ++row) {
        uint32_t* to = memory_.queries + (h * rows_ + row) * memory_.units * kLanes;
        with_query(call_, segment_.token + row / group_, q_head(h, row), [&](const auto* from) {
          for (int64_t unit = 0; unit < memory_.units; ++unit, to += kLanes) {
            const int at = int(unit) * 16, left = kv_.key_dim - at;
            const __m512i numbers = DotArith::row_units(from + at, left < 16 ? left : 16);
            DotArith::store(to, _mm512_inserti64x4(numbers, _mm512_castsi512_si256(numbers), 1));
          }
        });
        memory_.states[h * rows_ + row] = kNothing;
      }
    }
    __builtin_memset(memory_.outputs, 0, size_t(heads_ * rows_ * memory_.dims) * sizeof(float));
  }

  /// Looks at a block: what is seen of it, and where its keys lie. Null stands where nobody looks.
  void enter(int block) {
    seen_ = {kBlockTokens, 0};
    if (block >= item_.block_end) return;
    for (int row = 0; row < rows_; row += group_) {
      const RowRange range = range_in(call_, position(row), block);
      if (range.low >= range.high) continue;
      seen_.low = range.low < seen_.low ? range.low : seen_.low;
      seen_.high = range.high > seen_.high ? range.high : seen_.high;
    }
    if (seen_.low >= seen_.high) return;
    begin_ = seen_.low / kPanel * kPanel;
    end_ = int(round_up(seen_.high, kHalf));
    for (int key = begin_; key < seen_.low; ++key) memory_.keys[key] = nullptr;
    for (int key = seen_.high; key < end_; ++key) memory_.keys[key] = nullptr;
    for (int key = seen_.low; key < seen_.high;) {
      const int at = block * kBlockTokens + key, page = at / kv_.page_tokens;
      int offset = at - page * kv_.page_tokens;
      const char* from = kv_.base + kv_.key_offset + segment_.pages[page] * kv_.page_stride;
      for (; offset < kv_.page_tokens && key < seen_.high; ++offset, ++key) {
        memory_.keys[key] = from + offset * kv_.token_stride;
      }
    }
  }

  int span_end(int key) const {
    const int end = (key / span_ + 1) * span_;
    return end < end_ ? end : end_;
  }

  int64_t offset_of(Side side, int h) const {
    return (head_ + h) * kv_.head_stride + (side == Side::keys ? 0 : kv_.value_offset - kv_.key_offset);
  }

  /// All keys, or values, of the block, in the order of memory.
  void walk(Side side, int block) {
    for (int key = begin_, end; key < end_; key = end) {
      end = span_end(key);
      const bool regular = is_regular(key, end);
      for (int h = 0; h < heads_; ++h) {
        RowList rows{};
        rows.count = end - key;
        rows.dim = side == Side::keys ? kv_.key_dim : kv_.value_dim;
        if (regular) {
          rows.first = memory_.keys[key] + offset_of(side, h);
          rows.stride = kv_.token_stride;
        } else {
          rows.first = copy(side, h, key, end);
          rows.stride = FewMemory::row_bytes(call_);
        }
        rows.next = ahead(side, h, key, block);
        visit(side, h, key, rows);
      }
    }
  }

  /// Whether rows [key, end) are all seen and equally far apart.
  bool is_regular(int key, int end) const {
    if (key < seen_.low || end > seen_.high) return false;
    return memory_.keys[end - 1] - memory_.keys[key] == (end - 1 - key) * kv_.token_stride && end - key <= span_ &&
           (kv_.page_tokens % span_ == 0);
  }

  /// Rows of one head side by side. Zeros for those that nobody sees: there may be anything, and 0 times NaN is NaN.
  const char* copy(Side side, int h, int key, int end) const {
    const int64_t stride = FewMemory::row_bytes(call_);
    const int64_t size = bytes_of(kv_.type) * (side == Side::keys ? kv_.key_dim : kv_.value_dim) +
                         (kv_.inline_scales ? int64_t{sizeof(float)} : 0);
    for (int i = key; i < end; ++i) {
      char* to = memory_.copies + (i - key) * stride;
      if (memory_.keys[i] == nullptr) {
        __builtin_memset(to, 0, size_t(size));
      } else {
        __builtin_memcpy(to, memory_.keys[i] + offset_of(side, h), size_t(size));
      }
    }
    return memory_.copies;
  }

  /// The row whose turn comes kAhead visits later, to be fetched with those behind it; or null.
  const char* ahead(Side side, int h, int key, int block) const {
    h += kAhead;
    for (; h >= heads_ && key < end_; h -= heads_) key = span_end(key);
    if (key >= end_ && side == Side::keys) {
      side = Side::values;
      for (key = begin_; h >= heads_ && key < end_; h -= heads_) key = span_end(key);
    }
    if (key < end_) return memory_.keys[key] == nullptr ? nullptr : memory_.keys[key] + offset_of(side, h);
    return in_block(block + 1, h);
  }

  /// Of a block that comes later; h counts on over its spans.
  const char* in_block(int block, int h) const {
    const int at = block * kBlockTokens + h / heads_ * span_;
    if (block >= item_.block_end || at >= segment_.start + segment_.count) return nullptr;
    const char* page = kv_.base + segment_.pages[at / kv_.page_tokens] * kv_.page_stride;
    return page + kv_.key_offset + at % kv_.page_tokens * kv_.token_stride + offset_of(Side::keys, h % heads_);
  }

  void visit(Side side, int h, int key, RowList& list) const {
    if (kv_.inline_scales) scale(side, h, key, list);
    for (int row = 0; row < rows_; row += kMostTogether) {
      const int64_t place = h * rows_ + row;
      const Direct& direct = direct_[(rows_ - row < kMostTogether ? rows_ - row : kMostTogether) - 1];
      if (side == Side::keys) {
        const uint32_t* queries = memory_.queries + place * memory_.units * kLanes;
        direct.scores(queries, list, memory_.scores + place * kBlockTokens + key);
      } else {
        const uint32_t* weights = memory_.weights + (place * kBlockTokens + key) / 2;
        direct.values(weights, list, key == begin_, memory_.sums + place * memory_.dims, memory_.dims);
      }
      list.next = nullptr;
    }
  }

  /// Reads the scales behind the rows of a span, now that these are on their way, and scales the weights of values.
  void scale(Side side, int h, int key, const RowList& list) const {
    float* scales = side == Side::keys ? memory_.key_scale + h * kBlockTokens + key : memory_.value_scale;
    const char* from = list.first + list.dim * bytes_of(kv_.type);
    for (int i = 0; i < list.count; ++i) __builtin_memcpy(scales + i, from + i * list.stride, sizeof(float));
    if (side == Side::keys) return;
    for (int row = 0; row < rows_; ++row) {
      const int64_t place = int64_t{h * rows_ + row} * kBlockTokens + key;
      for (int i = 0; i < list.count; i += kLanes) {
        const f32v weights = f32v::load(memory_.scores + place + i) * f32v::load(scales + i);
        DotArith::pack_weights(weights, memory_.weights + (place + i) / 2);
      }
    }
  }

  void soften_rows(int block) {
    for (int h = 0; h < heads_; ++h) {
      const ScoreRule rule = rule_of(call_, head_ + h, memory_.key_scale + h * kBlockTokens, nullptr);
      for (int row = 0; row < rows_; ++row) {
        const int64_t place = h * rows_ + row;
        RowRange range = range_in(call_, position(row), block);
        if (range.low >= range.high) range = {end_, end_};  // another row sees the block
        float* scores = memory_.scores + place * kBlockTokens;
        uint32_t* weights = memory_.weights + place * kBlockTokens / 2;
        RowState& found = memory_.found[place];
        found.top = kv_.inline_scales ? soften<DotArith, false>(rule, range, begin_, end_, scores, weights, &found.sum)
                                      : soften<DotArith>(rule, range, begin_, end_, scores, weights, &found.sum);
      }
    }
  }

  /// Takes the block's values into the rows that see it.
  void take_in(int block) {
    for (int64_t place = 0; place < int64_t{heads_} * rows_; ++place) {
      const int h = int(place / rows_), row = int(place % rows_);
      const RowRange range = range_in(call_, position(row), block);
      if (range.low >= range.high) continue;
      const float* sums = memory_.sums + place * memory_.dims;
      if (!item_.whole) {
        leave_row(call_, segment_, block, q_head(h, row), memory_.found[place], sums);
        continue;
      }
      RowMerge merge;
      merge_states(memory_.found + place, 1, memory_.states + place, &merge);
      float* to = memory_.outputs + place * memory_.dims;
      for (int64_t at = 0; at < memory_.dims; at += kLanes) {
        const f32v add = f32v::load(sums + at) * f32v::set(merge.add);
        fma(f32v::load(to + at), f32v::set(merge.keep), add).store(to + at);
      }
    }
  }

  void finish() {
    for (int h = 0; h < heads_; ++h) {
      for (int row = 0; row < rows_; ++row) {
        const int64_t place = h * rows_ + row;
        write_row_as(call_, segment_.token + row / group_, q_head(h, row), memory_.states[place],
                     memory_.outputs + place * memory_.dims);
      }
    }
  }

  const AttendCall& call_;
  const KvView& kv_;
  const AttendItem& item_;
  const AttendSegment& segment_;
  const int head_;
  const int heads_;
  const int group_;
  const int rows_;  // query rows per kv head
  const Direct* direct_;
  FewMemory memory_;
  int span_;
  RowRange seen_{};  // of the block at hand, by any row
  int begin_ = 0, end_ = 0;
};

#endif

}  // namespace ml::ML_ISA
