// How a group of ops joins the Python module: in bind/NAME.cpp,
//
//   ML_BIND(name) { m.def("op", ...); }
//
// The groups register themselves, so that a build with ML_ONLY can leave some out.
#pragma once

#include <nanobind/nanobind.h>

namespace ml::bind {

struct Group {
  explicit Group(void (*define)(nanobind::module_&));
};

}  // namespace ml::bind

#define ML_BIND(name)                                     \
  static void bind_##name(nanobind::module_& m);          \
  static const ml::bind::Group group_##name(bind_##name); \
  static void bind_##name(nanobind::module_& m)
