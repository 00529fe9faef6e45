// Whole pages from pool to pool, checksummed on the way.
#pragma once

#include <cstdint>

namespace ml {

/// Pages as equal strides of memory.
struct PageMemory {
  char* base;
  int64_t stride;  // bytes from page to page
};

/// Page from_ids[i] of `from` goes to page to_ids[i] of `to`, i < count, `bytes` of each; null ids count up from 0.
/// With sums not null sums[i] becomes checksum(page, bytes, seed) of base/checksum.h in the same pass. No page may be
/// written twice, or written and read. On the thread pool.
void copy_pages(PageMemory from, const int32_t* from_ids, PageMemory to, const int32_t* to_ids, int64_t count,
                int64_t bytes, uint64_t* sums, uint64_t seed);

/// Checksums only.
void sum_pages(PageMemory from, const int32_t* from_ids, int64_t count, int64_t bytes, uint64_t* sums, uint64_t seed);

}  // namespace ml
