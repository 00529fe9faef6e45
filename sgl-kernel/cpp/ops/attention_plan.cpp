#include "ops/attention_plan.h"

#include <algorithm>

#include "base/span.h"

namespace ml {

namespace {

constexpr int kMostQueries = 256;   // q rows that one task holds, unless a single token has more,
constexpr int kLessQueries = 128;   // or when there would be too few tasks
constexpr int kMostBlocks = 8;      // of one decode task
constexpr int kFewQueries = 16;     // q rows that wait for memory rather than compute
constexpr int kTasksPerThread = 2;  // fewer, and one slow thread holds up the others
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
  tasks_.clear();
  merges_.clear();
  heads_per_task_ = 1;
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
  const bool enough = int64_t(decode.size()) >= wanted || !prefill.empty();
  chunk_blocks_ = enough ? kMostBlocks : int(std::clamp<int64_t>(decode_blocks / wanted, 1, kMostBlocks));

  int64_t prefill_queries = 0;
  for (const Row& row : prefill) prefill_queries += int64_t{row.count} * shape.group;
  const bool many = prefill_queries / kMostQueries * shape.heads >= 4 * wanted;
  prefill_tokens_ = std::max(1, (many ? kMostQueries : kLessQueries) / shape.group);

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
  for (int at = 0; at < row.count; at += prefill_tokens_) {
    const Row part{row.token + at, row.pages, row.start + at, std::min(prefill_tokens_, row.count - at)};
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

int64_t AttendPlan::queries(const AttendItem& item) const {
  int64_t queries = 0;
  for (int i = item.segment; i < item.segment_end; ++i) queries += int64_t{segments_[i].count} * shape_.group;
  return queries;
}

/// Nanoseconds, roughly, of an item for one kv head: it reads keys and values, and every query meets every key.
int64_t AttendPlan::cost(const AttendItem& item) const {
  int64_t end = 0;
  for (int i = item.segment; i < item.segment_end; ++i) {
    end = std::max<int64_t>(end, segments_[i].start + segments_[i].count);
  }
  const int64_t keys = std::min<int64_t>(end, int64_t{item.block_end} * kBlockTokens) - item.block * kBlockTokens;
  return keys * shape_.value_dim * (queries(item) + 8) / 64;
}

/// Cuts the items into tasks, costly ones first. Heads lie side by side in a page: a task with few queries, which
/// waits for memory, takes as many of them as leave enough tasks. With many queries it takes what makes it worth
/// handing out.
void AttendPlan::finish() {
  int64_t few = 0;
  std::vector<int64_t> costs;
  for (const AttendItem& item : items_) {
    const int64_t rows = queries(item);
    most_queries_ = std::max(most_queries_, rows);
    few += rows <= kFewQueries ? 1 : 0;
    costs.push_back(cost(item));
  }
  const int64_t groups = few == 0 ? 1 : ceil_div(int64_t{kTasksPerThread} * shape_.threads, few);
  const int few_heads = int(ceil_div(shape_.heads, std::min<int64_t>(groups, shape_.heads)));
  for (std::size_t i = 0; i < items_.size(); ++i) {
    const int64_t worth = std::clamp<int64_t>(kTaskNanos / std::max<int64_t>(costs[i], 1), 1, shape_.heads);
    const int heads = queries(items_[i]) <= kFewQueries ? few_heads : int(worth);
    heads_per_task_ = std::max(heads_per_task_, heads);
    costs[i] *= heads;
    for (int head = 0; head < shape_.heads; head += heads) {
      tasks_.push_back({int32_t(i), head, std::min(head + heads, shape_.heads)});
    }
  }
  std::stable_sort(tasks_.begin(), tasks_.end(), [&](const AttendTask& a, const AttendTask& b) {
    return costs[std::size_t(a.item)] > costs[std::size_t(b.item)];
  });
}

}  // namespace ml
