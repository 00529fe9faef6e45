#include "ops/softcap.h"

#include <algorithm>

#include "base/pool.h"
#include "base/span.h"

namespace ml {

namespace {

constexpr int64_t kTaskElements = 16 * 1024;  // some 20 microseconds

}  // namespace

void softcap(float* x, int64_t count, int64_t columns, float cap) {
  const int64_t per_row = ceil_div(columns, kTaskElements);
  parallel(count * per_row, [&](int64_t task) {
    const int64_t begin = task % per_row * kTaskElements, end = std::min(columns, begin + kTaskElements);
    softcap_ops().run(x + task / per_row * columns + begin, end - begin, cap);
  });
}

}  // namespace ml
