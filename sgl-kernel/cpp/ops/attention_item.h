// One task of attention: the queries of some segments that belong to one kv head, over a range of blocks. Included from
// .inc.cpp only.
#pragma once

#include "ops/attention_pack.h"
#include "ops/attention_row.h"

namespace ml::ML_ISA {

/// How keys and values of one storage type become operands of arithmetic A.
template <class A>
struct Reader {
  void (*keys)(const char* const* rows, int begin, int end, int dim, typename A::Unit* out);
  void (*values)(const char* const* rows, int begin, int end, int dim, typename A::Unit* out);
};

constexpr int kQueriesAhead = 8;  // tokens

/// Where a task's arrays lie in its scratch memory.
template <class A>
struct ItemMemory {
  using Unit = typename A::Unit;
  int64_t bytes = 0;
  int64_t steps, ldq, dims, zero_bytes;
  Unit *keys, *values, *queries, *weights;
  float *outputs, *scores, *key_scale, *value_scale;
  RowState* states;
  int64_t* tokens;
  int32_t* positions;
  const char **key_rows, **value_rows;
  char* zeros;  // a row outside of what anybody sees

  ItemMemory(const AttendCall& call, char* base) {
    steps = ceil_div(call.kv.key_dim, A::kPair);
    ldq = round_up(steps, kLanes);
    dims = round_up(call.kv.value_dim, kHalf);
    // The longest row there can be: float32, and a scale.
    zero_bytes = 4 * (call.kv.key_dim > call.kv.value_dim ? call.kv.key_dim : call.kv.value_dim) + 4;
    take(base, keys, kBlockTokens * steps);
    take(base, values, round_up(dims, kPanel) * (kBlockTokens / A::kPair));
    take(base, queries, call.most_queries * ldq);
    take(base, weights, kTileRows * kBlockTokens / A::kPair);
    take(base, outputs, call.most_queries * dims);
    take(base, scores, kTileRows * kBlockTokens);
    take(base, key_scale, kBlockTokens);
    take(base, value_scale, kBlockTokens);
    take(base, states, call.most_queries);
    take(base, tokens, call.most_queries);
    take(base, positions, call.most_queries);
    take(base, key_rows, kBlockTokens);
    take(base, value_rows, kBlockTokens);
    take(base, zeros, zero_bytes);
  }

 private:
  template <class T>
  ML_INLINE void take(char* base, T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * int64_t{sizeof(T)}, kLine);
  }
};

template <class A>
class ItemRun {
 public:
  using Unit = typename A::Unit;

  ItemRun(const AttendCall& call, const AttendItem& item, int head, const Reader<A>& reader, void* scratch)
      : call_(call),
        kv_(call.kv),
        item_(item),
        segments_(call.segments),
        head_(head),
        group_(call.q_heads / call.kv.heads),
        reader_(reader),
        memory_(call, static_cast<char*>(scratch)) {
    rule_ = rule_of(call, head, memory_.key_scale, memory_.value_scale);
  }

  void run() {
    start();
    for (int block = item_.block; block < item_.block_end; ++block) {
      int64_t row = 0;
      for (int i = item_.segment; i < item_.segment_end;) {
        const int first = i;
        int64_t rows = 0;
        do {
          rows += int64_t{segments_[i].count} * group_;
          ++i;
        } while (i < item_.segment_end && same_keys(segments_[first], segments_[i], block));
        attend(segments_[first], block, row, row + rows);
        row += rows;
      }
    }
    if (item_.whole) finish();
  }

 private:
  void start() {
    int64_t row = 0;
    for (int i = item_.segment; i < item_.segment_end; ++i) {
      const AttendSegment& segment = segments_[i];
      for (int t = 0; t < segment.count; ++t) {
        if (t + kQueriesAhead < segment.count) prefetch_queries(segment.token + t + kQueriesAhead);
        for (int g = 0; g < group_; ++g, ++row) {
          memory_.tokens[row] = segment.token + t;
          memory_.positions[row] = segment.start + t;
          memory_.states[row] = kNothing;
          read_query(row, g);
        }
      }
    }
    __builtin_memset(memory_.outputs, 0, size_t(row * memory_.dims) * sizeof(float));
    __builtin_memset(memory_.zeros, 0, size_t(memory_.zero_bytes));
    rows_ = row;
  }

  /// All heads of a group at once: they lie side by side, the tokens far apart.
  void prefetch_queries(int64_t token) const {
    with_query(call_, token, head_ * group_, [&](const auto* from) {
      const char* const bytes = reinterpret_cast<const char*>(from);
      const int64_t count = int64_t{group_} * kv_.key_dim * int64_t{sizeof(*from)};
      for (int64_t at = 0; at < count; at += kLine) __builtin_prefetch(bytes + at);
    });
  }

  void read_query(int64_t row, int g) {
    with_query(call_, memory_.tokens[row], head_ * group_ + g, [&](const auto* from) {
      for (int64_t step = 0; step < memory_.ldq; step += kLanes) {
        const int at = int(step) * A::kPair;
        A::store(memory_.queries + row * memory_.ldq + step, A::row_units(from + at, kv_.key_dim - at));
      }
    });
  }

  bool visible(int64_t row, int block) const {
    const RowRange range = row_range(row, block);
    return range.low < range.high;
  }

  RowRange row_range(int64_t row, int block) const { return range_in(call_, memory_.positions[row], block); }

  /// Whether the block lies in the same pages for both segments, and wholly before their last query.
  bool same_keys(const AttendSegment& a, const AttendSegment& b, int block) const {
    const int end = (block + 1) * kBlockTokens;
    if (a.start + a.count < end || b.start + b.count < end) return false;
    for (int page = block * kBlockTokens / kv_.page_tokens; page * kv_.page_tokens < end; ++page) {
      if (a.pages[page] != b.pages[page]) return false;
    }
    return true;
  }

  /// Rows [first, last) over one block, whose keys `segment` knows where to find.
  void attend(const AttendSegment& segment, int block, int64_t first, int64_t last) {
    RowRange all = {kBlockTokens, 0};
    for (int64_t row = first; row < last; row += group_) {
      const RowRange range = row_range(row, block);
      if (range.low >= range.high) continue;
      all.low = range.low < all.low ? range.low : all.low;
      all.high = range.high > all.high ? range.high : all.high;
    }
    if (all.low >= all.high) return;
    find_rows(segment, block, all);
    const int begin = all.low / kPanel * kPanel, end = int(round_up(all.high, kHalf));
    reader_.keys(memory_.key_rows, begin, end, kv_.key_dim, memory_.keys);
    reader_.values(memory_.value_rows, begin, end, kv_.value_dim, memory_.values);
    for (int64_t row = first; row < last;) {
      int count = 0;
      while (count < kTileRows && row + count < last && visible(row + count, block)) ++count;
      if (count > 0) tile(row, count, block);
      row += count > 0 ? count : 1;
    }
  }

  /// Addresses of the block's keys and values, and their scales. Nobody sees what lies outside of `seen`: zeros stand
  /// there, since those pages may hold anything, and 0 times NaN is NaN.
  void find_rows(const AttendSegment& segment, int block, RowRange seen) {
    const int begin = seen.low / kPanel * kPanel, end = int(round_up(seen.high, kHalf));
    const auto hide = [&](int from, int to) {
      for (int key = from; key < to; ++key) memory_.key_rows[key] = memory_.value_rows[key] = memory_.zeros;
    };
    hide(begin, seen.low);
    hide(seen.high, end);
    const char* base = kv_.base + head_ * kv_.head_stride;
    int key = seen.low;
    while (key < seen.high) {
      const int position = block * kBlockTokens + key, page = position / kv_.page_tokens;
      int offset = position - page * kv_.page_tokens;
      const char* from = base + segment.pages[page] * kv_.page_stride;
      for (; offset < kv_.page_tokens && key < seen.high; ++offset, ++key) {
        memory_.key_rows[key] = from + kv_.key_offset + offset * kv_.token_stride;
        memory_.value_rows[key] = from + kv_.value_offset + offset * kv_.token_stride;
      }
    }
    if (kv_.inline_scales) read_scales(begin, end);
  }

  void read_scales(int begin, int end) {
    const int64_t size = bytes_of(kv_.type);
    for (int key = begin; key < end; ++key) {
      __builtin_memcpy(memory_.key_scale + key, memory_.key_rows[key] + kv_.key_dim * size, sizeof(float));
      __builtin_memcpy(memory_.value_scale + key, memory_.value_rows[key] + kv_.value_dim * size, sizeof(float));
    }
  }

  void tile(int64_t row, int count, int block) {
    switch (count) {
      case 1:
        return tile_of<1>(row, block);
      case 2:
        return tile_of<2>(row, block);
      case 3:
        return tile_of<3>(row, block);
#if defined(ML_ISA_AVX512)
      case 4:
        return tile_of<4>(row, block);
      case 5:
        return tile_of<5>(row, block);
#endif
      default:
        return tile_of<kTileRows>(row, block);
    }
  }

  template <int R>
  __attribute__((noinline)) void tile_of(int64_t row, int block) {
    RowRange ranges[R], all = {kBlockTokens, 0};
    for (int r = 0; r < R; ++r) {
      ranges[r] = row_range(row + r, block);
      all.low = ranges[r].low < all.low ? ranges[r].low : all.low;
      all.high = ranges[r].high > all.high ? ranges[r].high : all.high;
    }
    const int begin = all.low / kPanel * kPanel, end = int(round_up(all.high, kHalf));
    const Unit* queries = memory_.queries + row * memory_.ldq;
    tile_scores<A, R>(queries, memory_.ldq, memory_.keys, int(memory_.steps), begin, end, memory_.scores);
    RowState states[R];
    for (int r = 0; r < R; ++r) {
      states[r].top = soften<A>(rule_, ranges[r], begin, end, memory_.scores + r * kBlockTokens,
                                memory_.weights + r * (kBlockTokens / A::kPair), &states[r].sum);
    }
    RowMerge merge[R];
    if (item_.whole) merge_states(states, R, memory_.states + row, merge);
    float* outputs = memory_.outputs + row * memory_.dims;
    const RowMerge* how = item_.whole ? merge : nullptr;
    tile_values<A, R>(memory_.weights, memory_.values, begin, end, int(memory_.dims), how, outputs, memory_.dims);
    if (!item_.whole) leave(row, R, block, states);
  }

  /// Leaves the rows' results over one block for the merge.
  void leave(int64_t row, int count, int block, const RowState* states) {
    for (int r = 0; r < count; ++r) {
      const AttendSegment& segment = segments_[item_.segment + (row + r) / group_];  // one token each
      const int q_head = head_ * group_ + int((row + r) % group_);
      leave_row(call_, segment, block, q_head, states[r], memory_.outputs + (row + r) * memory_.dims);
    }
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      write_row_as(call_, memory_.tokens[row], head_ * group_ + int(row % group_), memory_.states[row],
                   memory_.outputs + row * memory_.dims);
    }
  }

  const AttendCall& call_;
  const KvView& kv_;
  const AttendItem& item_;
  const AttendSegment* segments_;
  const int head_;
  const int group_;
  const Reader<A>& reader_;
  ItemMemory<A> memory_;
  ScoreRule rule_;
  int64_t rows_ = 0;
};

}  // namespace ml::ML_ISA
