#include "bind/module.h"

#include <vector>

namespace ml::bind {
namespace {

std::vector<void (*)(nanobind::module_&)>& groups() {
  static std::vector<void (*)(nanobind::module_&)> all;
  return all;
}

}  // namespace

Group::Group(void (*define)(nanobind::module_&)) { groups().push_back(define); }

}  // namespace ml::bind

NB_MODULE(_C, m) {
  m.doc() = "MoonLang's CPU kernels; use them through the functions of the package sgl_kernel";
  for (auto* define : ml::bind::groups()) define(m);
}
