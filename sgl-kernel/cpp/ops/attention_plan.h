// Who computes what in one attention call. A plan depends on page tables and lengths only, so the layers of a forward
// that have the same window share one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ml {

constexpr int kBlockTokens = 256;  // the unit in which softmax is merged: part of the arithmetic, see attention.h

/// Consecutive queries of one row. Query i has position start + i and sees the keys before and at it.
struct AttendSegment {
  int64_t token;         // the first query's place in the batch
  int64_t partials;      // place of this row's partial results in the buffer, in floats; -1: none
  const int32_t* pages;  // the row's page table
  int32_t start;
  int32_t count;
  int32_t first_block;  // the first block that the row sees at all
};

/// The work per kv head: blocks [block, block_end) for some segments, in an order in which segments that
/// share pages stand together.
struct AttendItem {
  int32_t segment;
  int32_t segment_end;
  int32_t block;
  int32_t block_end;
  bool whole;  // these are all blocks of the segments: write the result. Otherwise leave (m, l, o) of each block
};

/// An item for kv heads [head, head_end).
struct AttendTask {
  int32_t item;
  int32_t head;
  int32_t head_end;
};

/// A decode row whose blocks were left as partial results.
struct AttendMerge {
  int64_t token;
  int64_t partials;
  int32_t blocks;
};

/// Rows of one forward. Row i has lengths[i] queries from position starts[i] on; queries lie in row order.
struct AttendRows {
  const int32_t* pages;  // [rows, ld]
  int64_t ld;
  const int32_t* starts;
  const int32_t* lengths;
  int32_t rows;
};

/// What the plan must know of the model.
struct AttendShape {
  int32_t heads;  // kv heads
  int32_t group;  // q heads per kv head
  int32_t page_tokens;
  int32_t value_dim;
  int32_t window;  // 0: none
  int32_t threads;
};

class AttendPlan {
 public:
  /// Keeps `rows.pages` (not the lengths): it must outlive the plan's use.
  void build(const AttendRows& rows, const AttendShape& shape);

  const AttendShape& shape() const { return shape_; }
  const std::vector<AttendSegment>& segments() const { return segments_; }
  const std::vector<AttendItem>& items() const { return items_; }
  const std::vector<AttendTask>& tasks() const { return tasks_; }  // costly ones first
  const std::vector<AttendMerge>& merges() const { return merges_; }
  int64_t tokens() const { return tokens_; }
  int64_t partial_floats() const { return partial_floats_; }
  int64_t most_queries() const { return most_queries_; }  // q rows of the largest item, per kv head
  int heads_per_task() const { return heads_per_task_; }

 private:
  struct Row;
  void order_rows(std::vector<Row>& rows) const;
  void add_prefill(const Row& row);
  void add_decode(const std::vector<Row>& rows, std::size_t begin, std::size_t end, int shared);
  void add_item(std::size_t first_segment, int block, int block_end, bool whole);
  void join_prefill();
  int64_t queries(const AttendItem& item) const;
  int64_t cost(const AttendItem& item) const;
  void finish();

  AttendShape shape_{};
  std::vector<AttendSegment> segments_;
  std::vector<AttendItem> items_;
  std::vector<AttendTask> tasks_;
  std::vector<AttendMerge> merges_;
  int64_t tokens_ = 0;
  int64_t partial_floats_ = 0;
  int64_t most_queries_ = 0;
  int chunk_blocks_ = 0;
  int prefill_tokens_ = 0;  // of one task
  int heads_per_task_ = 1;  // at most
};

}  // namespace ml
