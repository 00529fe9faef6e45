// Mixtures of experts.
#include "ops/moe.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bind/arrays.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace ml;
using ml::bind::Array;
using ml::bind::Matrix;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

Activation gate_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu_erf") return Activation::gelu_erf;
  if (name == "relu") return Activation::relu;
  if (name == "bounded") return Activation::bounded;
  refuse("act: expected silu, gelu_tanh, gelu_erf, relu or bounded, got " + name);
}

Gating gating_of(int64_t experts_per_token, bool normalise, bool sigmoid, float scale, int64_t groups,
                 int64_t groups_kept) {
  return {experts_per_token, normalise, sigmoid, scale, groups, groups_kept};
}

void run(const Moe& moe, const ReadArray& x_array, const Array& y_array, const std::optional<ReadArray>& residual) {
  const Matrix x = bind::matrix(x_array, "x"), y = bind::matrix(y_array, "y");
  if (x.type != DType::f32 && x.type != DType::bf16 && x.type != DType::f16) {
    refuse("x: expected float32, bfloat16 or float16");
  }
  if (x.columns != moe.size()) refuse("x: expected " + std::to_string(moe.size()) + " columns");
  if (y.type != x.type || y.rows != x.rows || y.columns != x.columns) refuse("y: must have the shape and type of x");
  if (y.data == x.data && x.rows > 0) refuse("y: must not be x");
  Matrix add{};
  if (residual) {
    add = bind::matrix(*residual, "residual");
    if (add.type != y.type || add.rows != y.rows || add.columns != y.columns) {
      refuse("residual: must have the shape and type of y");
    }
  }
  const nb::gil_scoped_release released;
  moe.run(x.data, x.ld, y.data, y.ld, add.data, add.ld, x.type, x.rows);
}

void choose(const ReadArray& logits_array, const Gating& gating, const std::optional<ReadArray>& bias,
            const Array& weights_array, const Array& experts_array) {
  const Matrix logits = bind::matrix(logits_array, "logits"), weights = bind::matrix(weights_array, "weights");
  const Matrix experts = bind::matrix(experts_array, "experts");
  if (logits.type != DType::f32 || weights.type != DType::f32 || experts.type != DType::i32) {
    refuse("expected logits and weights float32, experts int32");
  }
  const int64_t n = logits.columns, per_token = gating.experts_per_token;
  if (n < 1 || n > kMaxExperts || logits.ld != n) refuse("logits: contiguous, at most 1024 experts");
  if (gating.groups < 1 || n % gating.groups != 0 || gating.groups_kept < 1 || gating.groups_kept > gating.groups) {
    refuse("groups must divide the experts, and groups_kept be at most as many");
  }
  if (per_token < 1 || per_token > n / gating.groups * gating.groups_kept) refuse("experts_per_token is out of range");
  for (const Matrix& out : {weights, experts}) {
    if (out.rows != logits.rows || out.columns != per_token || out.ld != per_token) {
      refuse("weights and experts: contiguous [rows, experts_per_token]");
    }
  }
  const float* added = bias ? static_cast<const float*>(bind::vector(*bias, "bias", DType::f32, n)) : nullptr;
  const nb::gil_scoped_release released;
  top_experts({&gating, static_cast<const float*>(logits.data), added, n, static_cast<float*>(weights.data),
               static_cast<int32_t*>(experts.data)},
              logits.rows);
}

}  // namespace

ML_BIND(moe) {
  nb::class_<Gating>(m, "Gating")
      .def(
          "__init__",
          [](Gating* self, int64_t experts_per_token, bool normalise, bool sigmoid, float scale, int64_t groups,
             int64_t groups_kept) {
            new (self) Gating(gating_of(experts_per_token, normalise, sigmoid, scale, groups, groups_kept));
          },
          "experts_per_token"_a, "normalise"_a, "sigmoid"_a, "scale"_a, "groups"_a, "groups_kept"_a);
  nb::class_<Moe>(m, "Moe")
      .def_prop_ro("size", &Moe::size)
      .def(
          "hold",
          [](Moe& self, std::shared_ptr<const Placement> placement, std::vector<PackedWeight> gate_up,
             std::vector<PackedWeight> down) {
            self.hold({std::move(placement), std::move(gate_up), std::move(down)});
          },
          "placement"_a.none(), "gate_up"_a, "down"_a)
      .def("take_counts", &Moe::take_counts);
  m.def(
      "moe",
      [](const PackedWeight& router, std::vector<float> bias, std::vector<PackedWeight> gate_up,
         std::vector<PackedWeight> down, std::vector<PackedWeight> shared, std::vector<PackedWeight> shared_gate,
         const Gating& gating, const std::string& act, std::shared_ptr<Ranks> ranks,
         std::vector<std::shared_ptr<Exchange>> lanes, std::shared_ptr<const Placement> placement, bool own_tokens,
         std::shared_ptr<Ranks> peers) {
        MoeWeights weights{router, std::move(bias), std::move(shared), std::move(shared_gate)};
        HeldExperts held{std::move(placement), std::move(gate_up), std::move(down)};
        return Moe(std::move(weights), std::move(held), gating, gate_named(act), std::move(ranks), std::move(lanes),
                   own_tokens, std::move(peers));
      },
      "router"_a, "bias"_a, "gate_up"_a, "down"_a, "shared"_a, "shared_gate"_a, "gating"_a, "act"_a,
      "ranks"_a = nb::none(), "lanes"_a = std::vector<std::shared_ptr<Exchange>>(), "placement"_a = nb::none(),
      "own_tokens"_a = false, "peers"_a = nb::none());
  m.def("run_moe", &run, "moe"_a, "x"_a, "y"_a, "residual"_a.none());
  m.def("top_experts", &choose, "logits"_a, "gating"_a, "bias"_a.none(), "weights"_a, "experts"_a);
}
