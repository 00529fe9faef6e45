// Packed weights and their product.
#include "ops/gemm.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "bind/arrays.h"
#include "bind/kinds.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace ml;
using ml::bind::Matrix;
using ml::bind::refuse;

namespace {

Activation activation(const std::string& name) {
  constexpr const char* kNames[] = {"none", "silu", "gelu_tanh", "gelu_erf", "relu", "bounded"};
  for (int i = 0; i < 6; ++i) {
    if (name == kNames[i]) return Activation(i);
  }
  refuse("act: expected none, silu, gelu_tanh, gelu_erf, relu or bounded, got " + name);
}

void need_float(DType type, const char* name) {
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16) {
    refuse(std::string(name) + ": expected float32, bfloat16 or float16");
  }
}

PackedWeight pack_arrays(const std::vector<bind::ReadArray>& weights, const std::string& kind, bool gated,
                         Arena& arena, int64_t segments) {
  std::vector<Rows> sources;
  int64_t k = -1;
  for (const auto& weight : weights) {
    const Matrix m = bind::matrix(weight, "weight");
    need_float(m.type, "weight");
    if (k >= 0 && m.columns != k) refuse("weight: all matrices must have the same K");
    k = m.columns;
    sources.push_back({m.data, m.type, m.rows, m.ld});
  }
  if (sources.empty() || k == 0) refuse("weight: nothing to pack");
  const WeightKind wanted = bind::dense_kind(kind);
  const nb::gil_scoped_release released;
  return pack(sources, k, wanted, gated, arena, segments);
}

void gemm_arrays(const PackedWeight& w, const bind::ReadArray& x, const bind::Array& y,
                 const std::optional<bind::ReadArray>& bias, const std::optional<bind::ReadArray>& residual,
                 const std::string& act) {
  const Matrix in = bind::matrix(x, "x"), out = bind::matrix(y, "y");
  need_float(in.type, "x");
  need_float(out.type, "y");
  if (in.columns != w.k) refuse("x: expected " + std::to_string(w.k) + " columns, got " + std::to_string(in.columns));
  if (out.rows != in.rows || out.columns != w.columns()) {
    refuse("y: expected [" + std::to_string(in.rows) + ", " + std::to_string(w.columns()) + "]");
  }
  Epilogue epilogue;
  epilogue.act = activation(act);
  if (bias) epilogue.bias = static_cast<const float*>(bind::vector(*bias, "bias", DType::f32, w.n));
  if (residual) {
    const Matrix add = bind::matrix(*residual, "residual");
    if (add.type != out.type || add.rows != out.rows || add.columns != out.columns) {
      refuse("residual: must have the shape and type of y");
    }
    epilogue.residual = add.data;
    epilogue.ld_residual = add.ld;
  }
  const nb::gil_scoped_release released;
  gemm(w, in.data, in.type, in.ld, out.data, out.type, out.ld, in.rows, epilogue);
}

}  // namespace

ML_BIND(gemm) {
  nb::class_<Arena>(m, "Arena")
      .def(nb::init<int64_t>(), "chunk_bytes"_a = int64_t{64} << 20)
      .def_prop_ro("taken_bytes", &Arena::taken_bytes);

  nb::class_<PackedWeight>(m, "PackedWeight")
      .def_prop_ro("kind", [](const PackedWeight& w) { return bind::kind_name(w); })
      .def_ro("n", &PackedWeight::n)
      .def_ro("k", &PackedWeight::k)
      .def_ro("gated", &PackedWeight::gated)
      .def_ro("segments", &PackedWeight::segments)
      .def_ro("bytes", &PackedWeight::bytes)
      .def_prop_ro("columns", &PackedWeight::columns)
      .def(
          "with_bias",
          [](const PackedWeight& w, const bind::ReadArray& bias) {  // the same memory, and a bias in every product
            PackedWeight made = w;
            const auto* data = static_cast<const float*>(bind::vector(bias, "bias", DType::f32, w.n));
            made.bias = std::shared_ptr<const float>(std::make_shared<bind::ReadArray>(bias), data);
            return made;
          },
          "bias"_a)
      .def(
          "with_bounds",
          [](const PackedWeight& w, float alpha, float limit) {
            PackedWeight made = w;
            made.bounds = {alpha, limit};
            return made;
          },
          "alpha"_a, "limit"_a)
      .def("memory", [](nb::handle self) {  // uint8 [bytes], alive as long as the view
        const auto& w = nb::cast<const PackedWeight&>(self);
        const size_t shape[] = {size_t(w.bytes)};
        return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(w.memory.get(), 1, shape, self);
      });

  m.def("pack", &pack_arrays, "weights"_a, "kind"_a, "gated"_a, "arena"_a, "segments"_a = 1);
  m.def("gemm", &gemm_arrays, "w"_a, "x"_a, "y"_a, "bias"_a = nb::none(), "residual"_a = nb::none(), "act"_a = "none");
}
