#include "ops/attention.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "base/pool.h"
#include "base/span.h"

namespace ml {

namespace {

void check(const AttendCall& call, const AttendPlan& plan) {
  const AttendShape& shape = plan.shape();
  const auto refuse = [](const char* why) { throw std::invalid_argument(std::string("attention: ") + why); };
  if (call.kv.heads != shape.heads || call.q_heads != shape.heads * shape.group) refuse("the plan is for other heads");
  if (call.kv.page_tokens != shape.page_tokens) refuse("the plan is for another page size");
  if (call.kv.value_dim != shape.value_dim) refuse("the plan is for another head size");
  if (call.window != shape.window) refuse("the plan is for another window");
  if (call.dtype != DType::f32 && call.dtype != DType::bf16 && call.dtype != DType::f16) {
    refuse("queries must be float32, bfloat16 or float16");
  }
  if (call.kv.type == DType::i32 || call.kv.type == DType::i64) refuse("keys and values cannot have this type");
}

}  // namespace

void attend(AttendCall call, const AttendPlan& plan) {
  check(call, plan);
  if (plan.items().empty()) return;
  const AttentionTable& ops = attention_ops();
  // The partial results outlive the tasks: slot 1 belongs to this call, slot 0 to each task.
  call.partials = static_cast<float*>(scratch(plan.partial_floats() * int64_t{sizeof(float)}, 1));
  call.segments = plan.segments().data();
  call.most_queries = plan.most_queries();
  const int64_t task_bytes = ops.scratch_bytes(call, plan.heads_per_task());
  const std::vector<AttendTask>& tasks = plan.tasks();
  parallel(int64_t(tasks.size()), [&](int64_t i) {
    const AttendTask& task = tasks[size_t(i)];
    ops.run(call, plan.items()[size_t(task.item)], task.head, task.head_end, scratch(task_bytes, 0));
  });
  if (plan.merges().empty()) return;
  parallel(int64_t(plan.merges().size()), [&](int64_t task) {
    void* memory = scratch(task_bytes, 0);
    for (int head = 0; head < plan.shape().heads; ++head) ops.merge(call, plan.merges()[size_t(task)], head, memory);
  });
}

}  // namespace ml
