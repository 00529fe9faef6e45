#include "ops/pages.h"

#include <algorithm>
#include <cstring>

#include "base/checksum.h"
#include "base/pool.h"
#include "base/span.h"

namespace ml {

namespace {

constexpr int64_t kTaskBytes = 1 << 19;  // about 20 us

char* page(PageMemory memory, const int32_t* ids, int64_t i) {
  return memory.base + (ids == nullptr ? i : int64_t{ids[i]}) * memory.stride;
}

template <class F>
void each_page(int64_t count, int64_t bytes, F f) {
  const int64_t together = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes));
  parallel(ceil_div(count, together), [&](int64_t task) {
    for (int64_t i = task * together; i < std::min(count, (task + 1) * together); ++i) f(i);
  });
}

}  // namespace

void copy_pages(PageMemory from, const int32_t* from_ids, PageMemory to, const int32_t* to_ids, int64_t count,
                int64_t bytes, uint64_t* sums, uint64_t seed) {
  each_page(count, bytes, [&](int64_t i) {
    const char* source = page(from, from_ids, i);
    char* target = page(to, to_ids, i);
    if (sums == nullptr) {
      std::memcpy(target, source, std::size_t(bytes));
    } else {
      sums[i] = checksum(source, bytes, seed, target);
    }
  });
}

void sum_pages(PageMemory from, const int32_t* from_ids, int64_t count, int64_t bytes, uint64_t* sums, uint64_t seed) {
  each_page(count, bytes, [&](int64_t i) { sums[i] = checksum(page(from, from_ids, i), bytes, seed); });
}

}  // namespace ml
