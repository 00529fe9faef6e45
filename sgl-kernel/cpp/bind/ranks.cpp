// Ranks of one host.
#include "base/ranks.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>

#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::Ranks;

namespace {

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> bytes_at(const void* data, int64_t size, nb::handle owner) {
  const size_t shape[] = {size_t(size)};
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(const_cast<void*>(data), 1, shape, owner);
}

}  // namespace

ML_BIND(ranks) {
  nb::exception<ml::RankLost>(m, "RankLostError", PyExc_RuntimeError);
  nb::class_<Ranks>(m, "Ranks")
      .def(
          "__init__",
          [](Ranks* self, const std::string& path, int rank, int size, int64_t part_bytes, int64_t patience_ms,
             int64_t spin_us) { new (self) Ranks(path, rank, size, part_bytes, patience_ms, spin_us); },
          "path"_a, "rank"_a, "size"_a, nb::kw_only(), "part_bytes"_a, "patience_ms"_a, "spin_us"_a)
      .def_prop_ro("rank", &Ranks::rank)
      .def_prop_ro("size", &Ranks::size)
      .def_prop_ro("part_bytes", &Ranks::part_bytes)
      .def("exchange", &Ranks::exchange, nb::call_guard<nb::gil_scoped_release>())
      .def("mine", [](nb::handle_t<Ranks> self) {
        const Ranks& ranks = nb::cast<const Ranks&>(self);
        return bytes_at(ranks.mine(), ranks.part_bytes(), self);
      })
      .def("part", [](nb::handle_t<Ranks> self, int rank) {
        const Ranks& ranks = nb::cast<const Ranks&>(self);
        if (rank < 0 || rank >= ranks.size()) throw nb::index_error("no such rank");
        return bytes_at(ranks.part(rank), ranks.part_bytes(), self);
      }, "rank"_a);
}
