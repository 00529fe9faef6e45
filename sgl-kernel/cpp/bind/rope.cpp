// Norm, rotation and page writes of one layer.
#include "ops/rope.h"

#include <nanobind/stl/optional.h>

#include <optional>

#include "bind/arrays.h"
#include "bind/kv_view.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::bind::Array;
using ml::bind::ReadArray;
using ml::bind::refuse;
using Maybe = std::optional<ReadArray>;

namespace {

ml::HeadNorm norm_of(const Maybe& weight, const char* name, ml::DType type, int dim) {
  if (!weight) return {nullptr, type, 0};
  const int64_t size = int64_t(weight->size());
  const ml::DType given = ml::bind::dtype_of(*weight, name);
  if (given != type && given != ml::DType::f32) refuse(std::string(name) + ": must be float32 or of the tokens' type");
  if (size < 1 || size > dim) refuse(std::string(name) + ": larger than a head");
  return {ml::bind::vector(*weight, name, given, size), given, int32_t(size)};
}

ml::RopeTable table_of(const Maybe& cos, const Maybe& sin, const Maybe& positions, int begin, int dim, bool interleaved,
                       ml::DType type, int64_t tokens) {
  ml::RopeTable table{};
  if (!cos || !sin) return table;
  const auto c = ml::bind::matrix(*cos, "cos"), s = ml::bind::matrix(*sin, "sin");
  if (c.rows != s.rows || c.columns != s.columns || c.ld != s.ld || c.type != s.type)
    refuse("cos and sin must be alike");
  if (c.type != type && c.type != ml::DType::f32) refuse("cos and sin must be float32 or of the tokens' type");
  if (c.columns != dim && 2 * c.columns != dim) refuse("cos must have rotary_dim columns, or half of them");
  table = {c.data, s.data, c.type, c.ld, nullptr, begin, dim, c.columns == dim, interleaved};
  if (!positions) {
    if (c.rows < tokens) refuse("cos must have a row per token");
    return table;
  }
  table.positions = static_cast<const int32_t*>(ml::bind::vector(*positions, "positions", ml::DType::i32, tokens));
  for (int64_t i = 0; i < tokens; ++i) {
    if (table.positions[i] < 0 || table.positions[i] >= c.rows) refuse("positions: beyond the table");
  }
  return table;
}

void check_places(const ml::RopeCall& call, int64_t pages) {
  for (int64_t i = 0; i < call.tokens; ++i) {
    if (call.store_page[i] < 0 || call.store_page[i] >= pages) refuse("store_page: no such page");
    if (call.store_offset[i] < 0 || call.store_offset[i] >= call.kv.page_tokens)
      refuse("store_offset: beyond the page");
  }
}

void rope_store(const std::optional<Array>& q, const ReadArray& k, const Maybe& v, const ml::bind::KvPages& kv,
                const ReadArray& store_page, const ReadArray& store_offset, const Maybe& cos, const Maybe& sin,
                const Maybe& positions, int rotary_begin, int rotary_dim, bool interleaved, const Maybe& q_norm,
                const Maybe& k_norm, double eps, const std::optional<Array>& q_out) {
  ml::RopeCall call{};
  call.kv = kv.view;
  const int dim = kv.view.key_dim;
  const auto keys = ml::bind::matrix(k, "k");
  if (keys.columns != int64_t{kv.view.heads} * dim) refuse("k: wrong number of columns");
  call.k = keys.data;
  call.k_stride = keys.ld;
  call.dtype = keys.type;
  call.tokens = keys.rows;
  call.head_dim = dim;
  const auto like_keys = [&](const ml::bind::Matrix& x, const char* name) {
    if (x.rows != keys.rows || x.type != keys.type) refuse(std::string(name) + ": must have the rows and type of k");
  };
  if (q) {
    const auto in = ml::bind::matrix(*q, "q"), out = q_out ? ml::bind::matrix(*q_out, "q_out") : in;
    like_keys(in, "q");
    like_keys(out, "q_out");
    if (in.columns % dim != 0 || out.columns != in.columns) refuse("q: wrong number of columns");
    call.q = in.data;
    call.q_out = out.data;
    call.q_stride = in.ld;
    call.q_out_stride = out.ld;
    call.q_heads = int32_t(in.columns / dim);
  }
  if (v) {
    const auto values = ml::bind::matrix(*v, "v");
    like_keys(values, "v");
    if (values.columns != int64_t{kv.view.heads} * kv.view.value_dim) refuse("v: wrong number of columns");
    call.v = values.data;
    call.v_stride = values.ld;
  }
  call.eps = float(eps);
  call.q_norm = norm_of(q_norm, "q_norm", call.dtype, dim);
  call.k_norm = norm_of(k_norm, "k_norm", call.dtype, dim);
  call.rope = table_of(cos, sin, positions, rotary_begin, rotary_dim, interleaved, call.dtype, call.tokens);
  call.store_page =
      static_cast<const int32_t*>(ml::bind::vector(store_page, "store_page", ml::DType::i32, call.tokens));
  call.store_offset =
      static_cast<const int32_t*>(ml::bind::vector(store_offset, "store_offset", ml::DType::i32, call.tokens));
  check_places(call, int64_t(kv.buffer.shape(0)));
  nb::gil_scoped_release release;
  ml::rope_store(call);
}

}  // namespace

ML_BIND(rope) {
  m.def("rope_store", &rope_store, "q"_a.none(), "k"_a, "v"_a.none(), "kv"_a, "store_page"_a, "store_offset"_a,
        "cos"_a.none(), "sin"_a.none(), "positions"_a.none(), "rotary_begin"_a, "rotary_dim"_a, "interleaved"_a,
        "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "q_out"_a.none());
}
