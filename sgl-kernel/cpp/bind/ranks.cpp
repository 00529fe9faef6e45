// The ranks that compute one model together.
#include "base/shared_ranks.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>

#include "base/arena.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::Ranks;

namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

Bytes bytes_at(const void* data, int64_t size, nb::handle owner) {
  const size_t shape[] = {size_t(size)};
  return Bytes(const_cast<void*>(data), 1, shape, owner);
}

/// Ranks whose parts Python carries: carry(own, others) with own [bytes], and a list of [bytes] to fill, by rank.
class CarriedRanks : public Ranks {
 public:
  CarriedRanks(int rank, int size, int64_t part_bytes, nb::callable carry)
      : Ranks(rank, size, part_bytes), memory_(parts_bytes()), carry_(std::move(carry)) {
    place(static_cast<char*>(memory_.data()));
  }
  ~CarriedRanks() override {
    const nb::gil_scoped_acquire held;
    carry_.reset();
  }

 private:
  void carry(uint32_t round, int64_t bytes) override {
    const nb::gil_scoped_acquire held;
    nb::list parts;
    for (int rank = 0; rank < size_; ++rank) parts.append(bytes_at(part_of(rank, round), bytes, nb::none()));
    carry_(parts);
  }

  ml::Buffer memory_;
  nb::callable carry_;
};

}  // namespace

ML_BIND(ranks) {
  nb::exception<ml::RankLost>(m, "RankLostError", PyExc_RuntimeError);
  nb::class_<Ranks>(m, "Ranks")
      .def_prop_ro("rank", &Ranks::rank)
      .def_prop_ro("size", &Ranks::size)
      .def_prop_ro("part_bytes", &Ranks::part_bytes)
      .def("exchange", &Ranks::exchange, "count"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("mine",
           [](nb::handle_t<Ranks> self) {
             const Ranks& ranks = nb::cast<const Ranks&>(self);
             return bytes_at(ranks.mine(), ranks.part_bytes(), self);
           })
      .def(
          "part",
          [](nb::handle_t<Ranks> self, int rank) {
            const Ranks& ranks = nb::cast<const Ranks&>(self);
            if (rank < 0 || rank >= ranks.size()) throw nb::index_error("no such rank");
            return bytes_at(ranks.part(rank), ranks.part_bytes(), self);
          },
          "rank"_a);
  nb::class_<ml::SharedRanks, Ranks>(m, "SharedRanks")
      .def(nb::init<const std::string&, int, int, int64_t, int64_t, int64_t>(), "path"_a, "rank"_a, "size"_a,
           nb::kw_only(), "part_bytes"_a, "patience_ms"_a, "spin_us"_a);
  nb::class_<CarriedRanks, Ranks>(m, "CarriedRanks")
      .def(nb::init<int, int, int64_t, nb::callable>(), "rank"_a, "size"_a, nb::kw_only(), "part_bytes"_a, "carry"_a);
}
