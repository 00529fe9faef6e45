#include "ops/attention_plan.h"

#include <algorithm>

#include "base/span.h"

namespace ml {

namespace {

constexpr int kMostQueries = 128;   // q rows that one task holds, unless a single token has more
constexpr int kMostBlocks = 8;      // of one decode task
constexpr int kTasksPerThread = 4;  // fewer, and one slow thread holds up the others
constexpr int64_t kTaskNanos = 20000;

}  // namespace

struct AttendPlan::Row {
  int64_t token;
  const int32_t* pages;
  int32_t start;
  int32_t count;

  int end_block() const { return (start + count - 1) / kBlockTokens + 1; }

  int first_block(int window) const { return window == 0 ? 0 : std::max(0, start + 1 - window) / kBlockTokens; }

  /// Leading blocks that both rows find in the same pages, and that end before their first queries.
  int shared_blocks(const Row& other, int page_tokens) const {
    const int most = std::min(start, other.start) / kBlockTokens;
    const int64_t most_pages = ceil_div(int64_t{most} * kBlockTokens, page_tokens);
    int64_t same = 0;
    while (same < most_pages && pages[same] == other.pages[same]) ++same;
    return same == most_pages ? most : int(same * page_tokens / kBlockTokens);
  }
};

void AttendPlan::build(const AttendRows& rows, const AttendShape& shape) {
  shape_ = shape;
  segments_.clear();
  items_.clear();
  merges_.clear();
  tokens_ = partial_floats_ = most_queries_ = 0;
  std::vector<Row> decode, prefill;
  int64_t decode_blocks = 0;
  for (int i = 0; i < rows.rows; ++i) {
    const Row row{tokens_, rows.pages + i * rows.ld, rows.starts[i], rows.lengths[i]};
    tokens_ += row.count;
    if (row.count == 1) {
      decode.push_back(row);
      decode_blocks += row.end_block() - row.first_block(shape.window);
    } else if (row.count > 1) {
      prefill.push_back(row);
    }
  }
  const int64_t wanted = int64_t{kTasksPerThread} * shape.threads;
  const bool enough = int64_t(decode.size()) * shape.heads >= wanted || !prefill.empty();
  chunk_blocks_ = enough ? kMostBlocks : int(std::clamp<int64_t>(decode_blocks * shape.heads / wanted, 1, kMostBlocks));

  order_rows(prefill);
  for (const Row& row : prefill) add_prefill(row);
  join_prefill();

  order_rows(decode);
  for (std::size_t begin = 0, end; begin < decode.size(); begin = end) {
    int shared = 0;
    for (end = begin + 1; end < decode.size() && int64_t(end + 1 - begin) * shape.group <= kMostQueries; ++end) {
      const int more = decode[end].shared_blocks(decode[end - 1], shape.page_tokens);
      if (more <= decode[end].first_block(shape.window) || 2 * more < shared) break;
      shared = shared == 0 ? more : std::min(shared, more);
    }
    add_decode(decode, begin, end, shared);
  }
  finish();
}

/// Brings rows with equal leading pages together.
void AttendPlan::order_rows(std::vector<Row>& rows) const {
  const int page_tokens = shape_.page_tokens;
  std::stable_sort(rows.begin(), rows.end(), [page_tokens](const Row& a, const Row& b) {
    const int a_pages = a.start / kBlockTokens * kBlockTokens / page_tokens;
    const int b_pages = b.start / kBlockTokens * kBlockTokens / page_tokens;
    return std::lexicographical_compare(a.pages, a.pages + a_pages, b.pages, b.pages + b_pages);
  });
}

void AttendPlan::add_item(std::size_t first_segment, int block, int block_end, bool whole) {
  items_.push_back({int32_t(first_segment), int32_t(segments_.size()), block, block_end, whole});
}

void AttendPlan::add_prefill(const Row& row) {
  const int step = std::max(1, kMostQueries / shape_.group);
  for (int at = 0; at < row.count; at += step) {
    const Row part{row.token + at, row.pages, row.start + at, std::min(step, row.count - at)};
    const int first = part.first_block(shape_.window);
    segments_.push_back({part.token, -1, part.pages, part.start, part.count, first});
    add_item(segments_.size() - 1, first, part.end_block(), true);
  }
}

/// Makes one item of neighbours that are small and begin with the same pages, so that these are read once.
void AttendPlan::join_prefill() {
  std::size_t kept = 0;
  int64_t queries = 0;
  for (std::size_t i = 0; i < items_.size(); ++i) {
    const AttendItem item = items_[i];
    const AttendSegment& now = segments_[item.segment];
    const int64_t more = int64_t{now.count} * shape_.group;
    if (kept > 0 && queries + more <= kMostQueries) {
      AttendItem& last = items_[kept - 1];
      const AttendSegment& before = segments_[last.segment_end - 1];
      const Row a{0, before.pages, before.start, before.count}, b{0, now.pages, now.start, now.count};
      if (before.pages != now.pages && a.shared_blocks(b, shape_.page_tokens) > now.first_block) {
        last.segment_end = item.segment_end;
        last.block = std::min(last.block, item.block);
        last.block_end = std::max(last.block_end, item.block_end);
        queries += more;
        continue;
      }
    }
    items_[kept++] = item;
    queries = more;
  }
  items_.resize(kept);
}

/// Rows [begin, end) read their first `shared` blocks together, and the rest each by itself.
void AttendPlan::add_decode(const std::vector<Row>& rows, std::size_t begin, std::size_t end, int shared) {
  const std::size_t first_segment = segments_.size();
  int from = shared;
  bool merged = end - begin > 1;
  for (std::size_t i = begin; i < end; ++i) {
    const int first = rows[i].first_block(shape_.window);
    from = std::min(from, first);
    merged = merged || rows[i].end_block() - first > chunk_blocks_;
    segments_.push_back({rows[i].token, -1, rows[i].pages, rows[i].start, 1, first});
  }
  for (int block = from; block < shared; block += chunk_blocks_) {
    add_item(first_segment, block, std::min(block + chunk_blocks_, shared), false);
  }
  for (std::size_t i = begin; i < end; ++i) {
    const int32_t segment = int32_t(first_segment + i - begin);
    AttendSegment& row = segments_[segment];
    const int last = rows[i].end_block();
    if (merged) {
      row.partials = partial_floats_;
      merges_.push_back({row.token, row.partials, last - row.first_block});
      partial_floats_ += int64_t{last - row.first_block} * shape_.heads * shape_.group * (shape_.value_dim + 2);
    }
    const int step = merged ? chunk_blocks_ : last;
    for (int block = std::max(shared, row.first_block); block < last; block += step) {
      items_.push_back({segment, segment + 1, block, std::min(block + step, last), !merged});
    }
  }
}

/// Nanoseconds, roughly, of an item for one kv head: it reads keys and values, and every query meets every key.
int64_t AttendPlan::cost(const AttendItem& item) const {
  int64_t queries = 0, end = 0;
  for (int i = item.segment; i < item.segment_end; ++i) {
    queries += int64_t{segments_[i].count} * shape_.group;
    end = std::max<int64_t>(end, segments_[i].start + segments_[i].count);
  }
  const int64_t keys = std::min<int64_t>(end, int64_t{item.block_end} * kBlockTokens) - item.block * kBlockTokens;
  return keys * shape_.value_dim * (queries + 8) / 64;
}

/// Costly items first, and the number of heads that makes a task worth handing out.
void AttendPlan::finish() {
  std::vector<std::pair<int64_t, AttendItem>> priced;
  int64_t total = 0;
  for (const AttendItem& item : items_) {
    int64_t queries = 0;
    for (int i = item.segment; i < item.segment_end; ++i) queries += int64_t{segments_[i].count} * shape_.group;
    most_queries_ = std::max(most_queries_, queries);
    priced.emplace_back(cost(item), item);
    total += priced.back().first;
  }
  std::stable_sort(priced.begin(), priced.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (std::size_t i = 0; i < priced.size(); ++i) items_[i] = priced[i].second;
  heads_per_task_ = 1;
  if (items_.empty()) return;
  const int64_t count = int64_t(items_.size());
  const int64_t worth = kTaskNanos * count / std::max<int64_t>(total, 1);
  const int64_t spread = count * shape_.heads / (2 * kTasksPerThread * shape_.threads);
  heads_per_task_ = int(std::clamp<int64_t>(std::min(worth, spread), 1, shape_.heads));
}

}  // namespace ml
