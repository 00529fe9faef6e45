#include "ops/rope.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/pool.h"
#include "base/span.h"

namespace ml {

namespace {

constexpr int64_t kTaskNumbers = 1 << 16;  // about 20 us

void check(const RopeCall& call) {
  const auto refuse = [](const char* why) { throw std::invalid_argument(std::string("rope_store: ") + why); };
  const auto plain = [](DType type) { return type == DType::f32 || type == DType::bf16 || type == DType::f16; };
  if (!plain(call.dtype)) refuse("q, k and v must be float32, bfloat16 or float16");
  if (std::max({call.head_dim, call.kv.key_dim, call.kv.value_dim}) > kMostHeadDim) refuse("heads are too large");
  if (call.rope.cos != nullptr) {
    const int64_t end = int64_t{call.rope.begin} + call.rope.dim;
    if (call.rope.begin < 0 || call.rope.dim % 2 != 0 || end > call.kv.key_dim) refuse("no such rotated dimensions");
    if (!plain(call.rope.type)) refuse("cos and sin must be float32, bfloat16 or float16");
  }
  if (call.q != nullptr && call.head_dim != call.kv.key_dim) refuse("queries and keys must have one size");
}

}  // namespace

void rope_store(const RopeCall& call) {
  check(call);
  const RopeKernels& ops = rope_ops();
  const int64_t row =
      int64_t{call.q_heads} * call.head_dim + int64_t{call.kv.heads} * (call.kv.key_dim + call.kv.value_dim);
  const int64_t together = std::max<int64_t>(1, kTaskNumbers / row);
  parallel(ceil_div(call.tokens, together),
           [&](int64_t task) { ops.run(call, task * together, std::min(call.tokens, (task + 1) * together)); });
}

}  // namespace ml
