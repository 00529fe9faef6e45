// Packing of quantised weights; they are multiplied by gemm() like the others.
#include "ops/quant.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "base/span.h"
#include "bind/arrays.h"
#include "bind/kinds.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace ml;
using ml::bind::Matrix;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

/// A dense [rows, groups] array of float32.
const float* per_group(const ReadArray& array, const char* name, int64_t rows, int64_t groups) {
  const Matrix m = bind::matrix(array, name);
  if (m.type != DType::f32 || m.rows != rows || m.columns != groups || m.ld != groups) {
    refuse(std::string(name) + ": expected contiguous float32 [" + std::to_string(rows) + ", " +
           std::to_string(groups) + "]");
  }
  return static_cast<const float*>(m.data);
}

PackedWeight pack_arrays(const std::vector<ReadArray>& codes, const std::vector<ReadArray>& scales,
                         const std::vector<std::optional<ReadArray>>& zeros, const std::string& kind, int64_t group,
                         int64_t lead, const std::optional<ReadArray>& order, bool gated, Arena& arena,
                         int64_t segments) {
  if (codes.empty() || codes.size() != scales.size() || codes.size() != zeros.size()) {
    refuse("codes, scales and zeros: need one of each per matrix");
  }
  const int64_t k = bind::matrix(codes[0], "codes").columns;
  if (k == 0) refuse("codes: nothing to pack");
  const QuantForm form = bind::quant_form(kind, group, lead, segments);
  const int64_t groups = form.groups(k);
  std::vector<QuantRows> sources;
  for (size_t i = 0; i < codes.size(); ++i) {
    const Matrix m = bind::matrix(codes[i], "codes");
    if (m.type != form.codes || m.columns != k) refuse("codes: expected one element type and one K that fit the kind");
    const float* const zero = zeros[i] ? per_group(*zeros[i], "zeros", m.rows, groups) : nullptr;
    sources.push_back(
        {static_cast<const int8_t*>(m.data), m.ld, per_group(scales[i], "scales", m.rows, groups), zero, m.rows});
  }
  const int32_t* at = nullptr;
  if (order) {
    at = static_cast<const int32_t*>(bind::vector(*order, "order", DType::i32, k));
    for (int64_t i = 0; i < k; ++i) {
      if (at[i] < 0 || at[i] >= k) refuse("order: an element is out of range");
    }
  }
  const nb::gil_scoped_release released;
  return pack_quantized(form, sources, k, at, gated, arena);
}

}  // namespace

ML_BIND(quant) {
  m.def("pack_quantized", &pack_arrays, "codes"_a, "scales"_a, "zeros"_a, "kind"_a, "group"_a, "lead"_a,
        "order"_a.none(), "gated"_a, "arena"_a, "segments"_a);
  m.def(
      "why_not_packable",
      [](const std::string& kind, int64_t k, int64_t group, bool zeros) {
        const char* const why = why_not_packable(bind::quant_form(kind, group), k, zeros);
        return std::string(why == nullptr ? "" : why);
      },
      "kind"_a, "k"_a, "group"_a, "zeros"_a);
}
