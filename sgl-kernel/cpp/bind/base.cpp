// The process-wide settings: instruction set and threads.
#include <nanobind/stl/string.h>

#include "base/checksum.h"
#include "base/cpu.h"
#include "base/pool.h"
#include "bind/arrays.h"
#include "bind/module.h"
#include "ops/convert.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

void convert(const ml::bind::ReadArray& from, const ml::bind::Array& to) {
  const ml::bind::Matrix x = ml::bind::matrix(from, "x"), y = ml::bind::matrix(to, "y");
  if (x.rows != y.rows || x.columns != y.columns) ml::bind::refuse("x and y must have one shape");
  const auto& ops = ml::convert_ops();
  const bool narrow = y.type != ml::DType::f32;
  if (narrow && (x.type != ml::DType::f32 || (y.type != ml::DType::bf16 && y.type != ml::DType::f16))) {
    ml::bind::refuse("one of x and y must be float32, and y float32, bfloat16 or float16");
  }
  ml::parallel(x.rows, [&](int64_t i) {
    if (narrow) {
      ops.from_f32(reinterpret_cast<const float*>(x.row(i)), y.row(i), y.type, x.columns);
    } else {
      ops.to_f32(x.row(i), x.type, reinterpret_cast<float*>(y.row(i)), x.columns);
    }
  });
}

}  // namespace

ML_BIND(base) {
  m.def("isa", [] { return std::string(ml::isa_name(ml::isa())); });
  m.def("detected_isa", [] { return std::string(ml::isa_name(ml::detected_isa())); });
  m.def("force_isa", &ml::force_isa, "name"_a);
  m.def("threads", &ml::threads);
  m.def("set_threads", &ml::set_threads, "n"_a, "pin"_a = false);
  m.def("convert", &convert, "x"_a, "y"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "checksum",
      [](nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> data, uint64_t seed) {
        return ml::checksum(data.data(), int64_t(data.nbytes()), seed);
      },
      "data"_a, "seed"_a = 0, nb::call_guard<nb::gil_scoped_release>());
}
