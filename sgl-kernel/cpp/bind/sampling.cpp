// From logits to tokens and log probabilities.
#include "ops/sampling.h"

#include "base/pool.h"
#include "bind/arrays.h"
#include "bind/module.h"

using namespace nanobind::literals;
using ml::DType;
using ml::bind::Array;
using ml::bind::Matrix;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

template <class T, class A>
T* column(const A& array, const char* name, DType type, int64_t size) {
  return static_cast<T*>(ml::bind::vector(array, name, type, size));
}

template <class A>
Matrix logits_matrix(const A& array) {
  const Matrix logits = ml::bind::matrix(array, "logits");
  if (logits.type != DType::f32) refuse("logits: expected float32");
  if (logits.columns == 0) refuse("logits: the vocabulary is empty");
  return logits;
}

/// float64 has no DType: kernels compute in float32, and only the sampler's thresholds are finer.
const double* doubles(const ReadArray& array, const char* name, int64_t size) {
  const bool right = array.ndim() == 1 && int64_t(array.shape(0)) == size && array.dtype() == nanobind::dtype<double>();
  if (!right || (size > 1 && array.stride(0) != 1)) {
    refuse(std::string(name) + ": expected float64 [" + std::to_string(size) + "], contiguous");
  }
  return static_cast<const double*>(array.data());
}

void sample(const ReadArray& logits_array, const ReadArray& temperature, const ReadArray& top_k, const ReadArray& top_p,
            const ReadArray& min_p, const ReadArray& seeds, const ReadArray& positions, const Array& tokens,
            const Array& peaks) {
  const Matrix logits = logits_matrix(logits_array);
  const int64_t n = logits.rows;
  ml::sample({static_cast<const float*>(logits.data), n, logits.columns, logits.ld,
              column<const float>(temperature, "temperature", DType::f32, n),
              column<const int64_t>(top_k, "top_k", DType::i64, n), doubles(top_p, "top_p", n),
              column<const float>(min_p, "min_p", DType::f32, n), column<const int64_t>(seeds, "seeds", DType::i64, n),
              column<const int64_t>(positions, "positions", DType::i64, n),
              column<int64_t>(tokens, "tokens", DType::i64, n), column<float>(peaks, "peaks", DType::f32, n)});
}

void log_probabilities(const ReadArray& logits_array, const ReadArray& temperature_array, const ReadArray& ids_array,
                       const Array& id_values_array, const Array& top_ids_array, const Array& top_values_array) {
  const Matrix logits = logits_matrix(logits_array), ids = ml::bind::matrix(ids_array, "ids");
  const Matrix id_values = ml::bind::matrix(id_values_array, "id_values");
  const Matrix top_ids = ml::bind::matrix(top_ids_array, "top_ids"),
               tops = ml::bind::matrix(top_values_array, "top_values");
  const int64_t n = logits.rows;
  const bool types =
      ids.type == DType::i64 && id_values.type == DType::f32 && top_ids.type == DType::i32 && tops.type == DType::f32;
  if (!types) refuse("expected ids int64, id_values float32, top_ids int32 and top_values float32");
  if (ids.rows != n || id_values.rows != n || top_ids.rows != n || tops.rows != n) refuse("one row per row of logits");
  if (ids.columns != id_values.columns || top_ids.columns != tops.columns || tops.columns > logits.columns) {
    refuse("ids and id_values, top_ids and top_values must have one width, no wider than the vocabulary");
  }
  const auto* temperature = column<const float>(temperature_array, "temperature", DType::f32, n);
  for (int64_t row = 0; row < n; ++row) {
    const auto* wanted = reinterpret_cast<const int64_t*>(ids.row(row));
    for (int64_t i = 0; i < ids.columns; ++i) {
      if (wanted[i] < 0 || wanted[i] >= logits.columns) refuse("ids: outside the vocabulary");
    }
  }
  ml::parallel(n, [&](int64_t row) {
    ml::log_probabilities(reinterpret_cast<const float*>(logits.row(row)), logits.columns,
                          {temperature[row], tops.columns, reinterpret_cast<float*>(tops.row(row)),
                           reinterpret_cast<int32_t*>(top_ids.row(row)), reinterpret_cast<const int64_t*>(ids.row(row)),
                           ids.columns, reinterpret_cast<float*>(id_values.row(row))});
  });
}

void apply_bitmask(const Array& logits_array, const ReadArray& bits_array) {
  const Matrix logits = logits_matrix(logits_array), bits = ml::bind::matrix(bits_array, "bits");
  if (bits.type != DType::i32 || bits.rows != logits.rows || 32 * bits.columns < logits.columns) {
    refuse("bits: expected int32 [rows, ceil(vocab / 32)]");
  }
  ml::parallel(logits.rows, [&](int64_t row) {
    ml::apply_bitmask(reinterpret_cast<float*>(logits.row(row)), logits.columns,
                      reinterpret_cast<const int32_t*>(bits.row(row)));
  });
}

void penalise(const Array& logits_array, const ReadArray& ids_array, const ReadArray& counts_array, float frequency,
              float presence, float repetition) {
  const int64_t vocab = logits_array.ndim() == 1 ? int64_t(logits_array.shape(0)) : 0;
  auto* logits = column<float>(logits_array, "logits", DType::f32, vocab);
  const int64_t n = ids_array.ndim() == 1 ? int64_t(ids_array.shape(0)) : -1;
  const auto* ids = column<const int64_t>(ids_array, "ids", DType::i64, n);
  const auto* counts = column<const float>(counts_array, "counts", DType::f32, n);
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) refuse("ids: outside the vocabulary");
  }
  ml::penalise(logits, ids, counts, n, {frequency, presence, repetition});
}

}  // namespace

ML_BIND(sampling) {
  const auto unlocked = nanobind::call_guard<nanobind::gil_scoped_release>();
  m.def("uniform", &ml::uniform, "seed"_a, "position"_a);
  m.def("sample", &sample, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seeds"_a, "positions"_a,
        "tokens"_a, "peaks"_a, unlocked);
  m.def("log_probabilities", &log_probabilities, "logits"_a, "temperature"_a, "ids"_a, "id_values"_a, "top_ids"_a,
        "top_values"_a, unlocked);
  m.def("apply_bitmask", &apply_bitmask, "logits"_a, "bits"_a, unlocked);
  m.def("penalise", &penalise, "logits"_a, "ids"_a, "counts"_a, "frequency"_a, "presence"_a, "repetition"_a, unlocked);
}
