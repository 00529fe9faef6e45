// Norms, gated activations and the embedding.
#include "ops/rowops.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "bind/arrays.h"
#include "bind/module.h"

using namespace nanobind::literals;
using ml::DType;
using ml::bind::Array;
using ml::bind::Matrix;
using ml::bind::matrix;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

DType checked_float(DType type, const char* name) {
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16) {
    refuse(std::string(name) + ": expected float32, bfloat16 or float16");
  }
  return type;
}

void same_rows(const Matrix& a, const Matrix& b, const char* what) {
  if (a.rows != b.rows || a.type != b.type) refuse(std::string(what) + " must have as many rows, and one element type");
}

void rms_norm(const ReadArray& x_array, const ReadArray& weight, float eps, bool gemma,
              const std::optional<Array>& y_array, const std::optional<Array>& residual_array) {
  const Matrix x = matrix(x_array, "x");
  const DType type = checked_float(x.type, "x");
  if (!y_array && !residual_array) refuse("give y, residual or both");
  ml::RmsNorm op{};
  op.type = type;
  op.form = gemma ? ml::NormForm::gemma : ml::NormForm::llama;
  op.sum = !residual_array ? ml::NormSum::none : y_array ? ml::NormSum::before : ml::NormSum::after;
  op.eps = eps;
  op.dim = x.columns;
  op.weight = ml::bind::vector(weight, "weight", gemma ? DType::f32 : type, x.columns);
  op.x = x.data;
  op.ldx = x.ld;
  if (residual_array) {
    const Matrix residual = matrix(*residual_array, "residual");
    same_rows(x, residual, "x and residual");
    if (residual.columns != x.columns) refuse("x and residual must have as many columns");
    op.residual = residual.data;
    op.ld_residual = residual.ld;
  }
  if (y_array) {
    const Matrix y = matrix(*y_array, "y");
    same_rows(x, y, "x and y");
    if (y.columns != x.columns) refuse("x and y must have as many columns");
    op.y = y.data;
    op.ldy = y.ld;
  }
  ml::rms_norm(op, x.rows);
}

ml::Gate gate_of(const std::string& name) {
  if (name == "silu") return ml::Gate::silu;
  if (name == "gelu_tanh") return ml::Gate::gelu_tanh;
  if (name == "gelu_erf") return ml::Gate::gelu_erf;
  if (name == "relu") return ml::Gate::relu;
  refuse("act: expected silu, gelu_tanh, gelu_erf or relu, got '" + name + "'");
}

void gated(const ReadArray& x_array, const Array& y_array, const std::string& act) {
  const Matrix x = matrix(x_array, "x"), y = matrix(y_array, "y");
  same_rows(x, y, "x and y");
  if (x.columns != 2 * y.columns) refuse("x must have twice the columns of y");
  ml::gated({checked_float(x.type, "x"), gate_of(act), y.columns, x.data, x.ld, y.data, y.ld}, x.rows);
}

void embedding(const ReadArray& ids_array, const ReadArray& table_array, const Array& y_array, float scale) {
  const Matrix table = matrix(table_array, "table"), y = matrix(y_array, "y");
  if (table.columns != y.columns || table.type != y.type) refuse("table and y must agree in columns and element type");
  const auto* ids = static_cast<const int64_t*>(ml::bind::vector(ids_array, "ids", DType::i64, y.rows));
  for (int64_t i = 0; i < y.rows; ++i) {
    if (ids[i] < 0 || ids[i] >= table.rows) refuse("ids: " + std::to_string(ids[i]) + " is outside the table");
  }
  ml::embedding({checked_float(y.type, "table"), scale, y.columns, table.data, table.ld, ids, y.data, y.ld}, y.rows);
}

}  // namespace

ML_BIND(rowops) {
  const auto unlocked = nanobind::call_guard<nanobind::gil_scoped_release>();
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "gemma"_a, "y"_a.none(), "residual"_a.none(), unlocked);
  m.def("gated", &gated, "x"_a, "y"_a, "act"_a, unlocked);
  m.def("embedding", &embedding, "ids"_a, "table"_a, "y"_a, "scale"_a, unlocked);
}
