// The vector functions one by one, for tests of their accuracy.
#include "ops/math.h"

#include "bind/arrays.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

void define(nb::module_& m, const char* name, ml::MathTable::Function ml::MathTable::* function) {
  m.def(
      name,
      [function](const ml::bind::ReadArray& x_array, const ml::bind::Array& y_array) {
        const int64_t n = int64_t(x_array.size());
        const void* x = ml::bind::vector(x_array, "x", ml::DType::f32, n);
        void* y = ml::bind::vector(y_array, "y", ml::DType::f32, n);
        (ml::math_ops().*function)(static_cast<const float*>(x), static_cast<float*>(y), n);
      },
      "x"_a, "y"_a);
}

}  // namespace

ML_BIND(math) {
  nb::module_ math = m.def_submodule("math", "float32 [n] -> float32 [n]");
  define(math, "exp", &ml::MathTable::exp);
  define(math, "sigmoid", &ml::MathTable::sigmoid);
  define(math, "silu", &ml::MathTable::silu);
  define(math, "tanh", &ml::MathTable::tanh);
  define(math, "gelu_erf", &ml::MathTable::gelu_erf);
  define(math, "gelu_tanh", &ml::MathTable::gelu_tanh);
}
