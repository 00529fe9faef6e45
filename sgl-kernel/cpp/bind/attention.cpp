// Attention over paged keys and values.
#include "ops/attention.h"

#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "base/pool.h"
#include "bind/arrays.h"
#include "bind/kv_view.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::bind::Array;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

/// A plan, and the page table it points into.
struct Plan {
  ml::AttendPlan plan;
  ReadArray table;
};

void build(Plan& self, const ReadArray& table, const ReadArray& starts, const ReadArray& lengths, int q_heads,
           int kv_heads, int page_tokens, int value_dim, int window) {
  const auto pages = ml::bind::matrix(table, "page_table");
  if (pages.type != ml::DType::i32) refuse("page_table must be int32");
  if (kv_heads < 1 || q_heads % kv_heads != 0) refuse("q_heads must be a multiple of kv_heads");
  if (page_tokens < 1 || value_dim < 1 || window < 0) refuse("page_tokens, value_dim or window is out of range");
  ml::AttendRows rows{static_cast<const int32_t*>(pages.data), pages.ld, nullptr, nullptr, int32_t(pages.rows)};
  rows.starts = static_cast<const int32_t*>(ml::bind::vector(starts, "starts", ml::DType::i32, pages.rows));
  rows.lengths = static_cast<const int32_t*>(ml::bind::vector(lengths, "lengths", ml::DType::i32, pages.rows));
  for (int32_t i = 0; i < rows.rows; ++i) {
    const int64_t end = int64_t{rows.starts[i]} + rows.lengths[i];
    if (rows.starts[i] < 0 || rows.lengths[i] < 0 || end > pages.columns * page_tokens) {
      refuse("row " + std::to_string(i) + " does not fit its page table");
    }
  }
  self.table = table;
  self.plan.build(rows, {kv_heads, q_heads / kv_heads, page_tokens, value_dim, window, ml::threads()});
}

/// A [T, heads, dim] array with contiguous heads, or a ValueError.
void check_tokens(const ml::bind::Matrix& x, const char* name, int64_t tokens, int64_t columns, ml::DType type) {
  if (x.rows != tokens || x.columns != columns || x.type != type)
    refuse(std::string(name) + ": wrong shape or element type");
}

void attend(Plan& plan, const ReadArray& q, const ml::bind::KvPages& kv, const Array& out, double scale, double softcap,
            const std::optional<ReadArray>& sinks) {
  const auto x = ml::bind::matrix(q, "q"), y = ml::bind::matrix(out, "out");
  const ml::AttendShape& shape = plan.plan.shape();
  const int q_heads = shape.heads * shape.group;
  check_tokens(x, "q", plan.plan.tokens(), int64_t{q_heads} * kv.view.key_dim, x.type);
  check_tokens(y, "out", plan.plan.tokens(), int64_t{q_heads} * kv.view.value_dim, x.type);
  ml::AttendCall call{};
  call.kv = kv.view;
  call.q = x.data;
  call.out = y.data;
  call.dtype = x.type;
  call.q_stride = x.ld;
  call.out_stride = y.ld;
  call.q_heads = q_heads;
  call.window = shape.window;
  call.scale = float(scale);
  call.softcap = float(softcap);
  if (sinks) call.sinks = static_cast<const float*>(ml::bind::vector(*sinks, "sinks", ml::DType::f32, q_heads));
  nb::gil_scoped_release release;
  ml::attend(call, plan.plan);
}

}  // namespace

ML_BIND(attention) {
  nb::class_<Plan>(m, "AttendPlan")
      .def(nb::init<>())
      .def("build", &build, "page_table"_a, "starts"_a, "lengths"_a, "q_heads"_a, "kv_heads"_a, "page_tokens"_a,
           "value_dim"_a, "window"_a)
      .def_prop_ro("address", [](const Plan& self) { return reinterpret_cast<uintptr_t>(&self.plan); })
      .def_prop_ro("items", [](const Plan& self) { return self.plan.items().size(); })
      .def_prop_ro("partial_floats", [](const Plan& self) { return self.plan.partial_floats(); });
  m.def("attend", &attend, "plan"_a, "q"_a, "kv"_a, "out"_a, "scale"_a, "softcap"_a, "sinks"_a.none());
}
