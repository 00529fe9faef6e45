// Tokens on their way to the ranks that hold their experts.
#include "ops/exchange.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>
#include <vector>

#include "base/mailboxes.h"
#include "bind/arrays.h"
#include "bind/module.h"
#include "ops/experts.h"
#include "ops/moe.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace ml;
using ml::bind::Array;
using ml::bind::Matrix;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

Bytes bytes_at(const void* data, int64_t size, nb::handle owner) {
  const size_t shape[] = {size_t(size)};
  return Bytes(const_cast<void*>(data), 1, shape, owner);
}

/// Mailboxes whose messages Python carries. post(letters by rank, None for its own) sends the messages of a round, and
/// take(rank) waits for one.
class CarriedMailboxes : public Mailboxes {
 public:
  CarriedMailboxes(int rank, int size, int64_t box_bytes, nb::callable post, nb::callable take)
      : Mailboxes(rank, size, box_bytes),
        memory_(int64_t{size} * 2 * box_bytes_),
        held_(size_t(size)),
        post_(std::move(post)),
        take_(std::move(take)) {}
  ~CarriedMailboxes() override {
    const nb::gil_scoped_acquire locked;
    held_.clear();
    post_.reset();
    take_.reset();
  }

  const Buffer& memory() const { return memory_; }

 private:
  char* box(int to, uint32_t round) const override {
    return static_cast<char*>(memory_.data()) + (int64_t{to} * 2 + round % 2) * box_bytes_;
  }

  void post(uint32_t round, const std::vector<int64_t>& bytes) override {
    const nb::gil_scoped_acquire locked;
    nb::list letters;
    for (int to = 0; to < size_; ++to) {
      to == rank_ ? letters.append(nb::none()) : letters.append(bytes_at(box(to, round), bytes[size_t(to)], nb::none()));
    }
    post_(letters);
  }

  Letter await(int from, uint32_t) override {
    const nb::gil_scoped_acquire locked;
    ReadArray& letter = held_[size_t(from)];
    letter = nb::cast<ReadArray>(take_(from));
    return {static_cast<const char*>(letter.data()), int64_t(letter.nbytes())};
  }

  Buffer memory_;
  std::vector<ReadArray> held_;  // the letters that were taken last
  nb::callable post_, take_;
};

std::shared_ptr<const Placement> placement_of(const std::vector<std::vector<std::pair<int, int>>>& copies,
                                              std::vector<int32_t> held) {
  Placement placement;
  placement.held = std::move(held);
  for (const auto& places : copies) {
    placement.copies.emplace_back();
    for (const auto& [rank, slot] : places) placement.copies.back().push_back({rank, slot});
  }
  placement.check(int(placement.held.size()));
  return std::make_shared<const Placement>(std::move(placement));
}

/// An exchange of arrays from Python, which are kept until they are no longer read.
class ArrayExchange : public Exchange {
 public:
  using Exchange::Exchange;

  void dispatch(const ReadArray& x_array, const ReadArray& chosen_array,
                const std::shared_ptr<const Placement>& placement) {
    const Matrix x = bind::matrix(x_array, "x"), chosen = bind::matrix(chosen_array, "chosen");
    if (x.type != DType::f32 && x.type != DType::bf16 && x.type != DType::f16) {
      refuse("x: expected float32, bfloat16 or float16");
    }
    if (chosen.type != DType::i32 || chosen.rows != x.rows || chosen.ld != chosen.columns) {
      refuse("chosen: expected [tokens, experts per token] int32");
    }
    if (int(placement->held.size()) != size()) refuse("a placement for another number of ranks");
    const int32_t* const ids = static_cast<const int32_t*>(chosen.data);
    for (int64_t i = 0; i < chosen.rows * chosen.columns; ++i) {
      if (ids[i] < 0 || ids[i] >= int64_t(placement->copies.size())) refuse("chosen: no such expert");
    }
    x_ = x_array;
    type_ = x.type;
    columns_ = x.columns;
    tokens_ = x.rows;
    per_token_ = chosen.columns;
    const nb::gil_scoped_release free;
    Exchange::dispatch({x.row(0), x.type, x.rows, x.columns, x.ld * bytes_of(x.type)}, ids, per_token_, placement);
  }

  std::vector<int64_t> arrived() {
    const nb::gil_scoped_release free;
    const std::vector<int64_t>& begin = Exchange::arrived();
    arrived_ = begin.back();
    return begin;
  }

  void rows(const Array& out_array) {
    const Matrix out = checked(out_array, "out");
    if (out.rows != arrived_) refuse("out: expected a row for each that arrived");
    const nb::gil_scoped_release free;
    side_by_side(0, out.rows, columns_ * bytes_of(type_), out.row(0), [&](int64_t i, char* to) { read(i, to); });
  }

  void give_back(const ReadArray& z_array) {
    const Matrix z = checked(z_array, "z");
    if (z.rows != arrived_) refuse("z: expected a row for each that arrived");
    z_ = z_array;
    const nb::gil_scoped_release free;
    Exchange::give_back(z.row(0));
  }

  void combine(const ReadArray& weights_array, const Array& y_array) {
    const Matrix y = checked(y_array, "y"), weights = bind::matrix(weights_array, "weights");
    if (y.rows != tokens_) refuse("y: expected a row for each token");
    if (weights.type != DType::f32 || weights.rows != tokens_ || weights.columns != per_token_ ||
        weights.ld != per_token_) {
      refuse("weights: expected [tokens, experts per token] float32");
    }
    const nb::gil_scoped_release free;
    const std::vector<const char*>& found = returned();
    const std::vector<const void*> z(found.begin(), found.end());
    Combine call{};
    call.type = type_;
    call.columns = columns_;
    call.per_token = per_token_;
    call.weights = static_cast<const float*>(weights.data);
    call.z = z.data();
    call.y = y.data;
    call.ldy = y.ld;
    in_steps(tokens_, std::max<int64_t>(1, (64 << 10) / (columns_ * (per_token_ + 1))),
             [&](int64_t begin, int64_t end) { moe_ops().combine(call, begin, end); });
  }

 private:
  template <class A>
  Matrix checked(const A& array, const char* name) const {
    const Matrix found = bind::matrix(array, name);
    if (found.type != type_ || found.columns != columns_) refuse(std::string(name) + ": must be like x");
    if (found.ld != columns_) refuse(std::string(name) + ": must be contiguous");
    return found;
  }

  ReadArray x_, z_;
  DType type_ = DType::f32;
  int64_t columns_ = 0, tokens_ = 0, per_token_ = 0, arrived_ = 0;
};

}  // namespace

ML_BIND(exchange) {
  nb::class_<Mailboxes>(m, "Mailboxes")
      .def_prop_ro("rank", &Mailboxes::rank)
      .def_prop_ro("size", &Mailboxes::size)
      .def_prop_ro("box_bytes", &Mailboxes::box_bytes)
      .def("outbox",
           [](nb::handle_t<Mailboxes> self, int to) {
             const Mailboxes& boxes = nb::cast<const Mailboxes&>(self);
             if (to < 0 || to >= boxes.size()) throw nb::index_error("no such rank");
             return bytes_at(boxes.outbox(to), boxes.box_bytes(), self);
           })
      .def("send", &Mailboxes::send, "counts"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "receive",
          [](nb::handle_t<Mailboxes> self, int sender) {
            Letter letter;
            {
              const nb::gil_scoped_release free;
              letter = nb::cast<Mailboxes&>(self).receive(sender);
            }
            return bytes_at(letter.data, letter.bytes, self);
          },
          "sender"_a);
  nb::class_<SharedMailboxes, Mailboxes>(m, "SharedMailboxes")
      .def(
          "__init__",
          [](SharedMailboxes* self, const std::string& path, uint64_t address, int64_t memory_bytes, int rank, int size,
             int64_t box_bytes, int64_t patience_ms, int64_t spin_us, const nb::object&) {
            new (self) SharedMailboxes(path, reinterpret_cast<char*>(address), memory_bytes, rank, size, box_bytes,
                                       patience_ms, spin_us);
          },
          "path"_a, "address"_a, "memory_bytes"_a, "rank"_a, "size"_a, nb::kw_only(), "box_bytes"_a, "patience_ms"_a,
          "spin_us"_a, "owner"_a, nb::keep_alive<1, 10>())
      .def_static("memory_bytes", &SharedMailboxes::memory_bytes, "size"_a, "box_bytes"_a);
  nb::class_<CarriedMailboxes, Mailboxes>(m, "CarriedMailboxes")
      .def(nb::init<int, int, int64_t, nb::callable, nb::callable>(), "rank"_a, "size"_a, nb::kw_only(), "box_bytes"_a,
           "post"_a, "take"_a)
      .def("memory", [](nb::handle_t<CarriedMailboxes> self) {
        const Buffer& memory = nb::cast<const CarriedMailboxes&>(self).memory();
        return bytes_at(memory.data(), memory.bytes(), self);
      });
  nb::class_<Placement>(m, "Placement")
      .def_static("of", &placement_of, "copies"_a, "held"_a);
  nb::class_<Exchange>(m, "ExchangeBase")
      .def_prop_ro("rank", &Exchange::rank)
      .def_prop_ro("size", &Exchange::size)
      .def("most_tokens", &Exchange::most_tokens, "row_bytes"_a, "per_token"_a);
  nb::class_<ArrayExchange, Exchange>(m, "Exchange")
      .def(
          "__init__",
          [](ArrayExchange* self, std::shared_ptr<Mailboxes> boxes, const std::string& payload) {
            if (payload != "plain" && payload != "int8") refuse("payload: expected plain or int8, got " + payload);
            new (self) ArrayExchange(std::move(boxes), payload == "int8" ? Payload::int8 : Payload::plain);
          },
          "boxes"_a, "payload"_a = "plain")
      .def("dispatch", &ArrayExchange::dispatch, "x"_a, "chosen"_a, "placement"_a)
      .def("arrived", &ArrayExchange::arrived)
      .def("rows", &ArrayExchange::rows, "out"_a)
      .def("give_back", &ArrayExchange::give_back, "z"_a)
      .def("combine", &ArrayExchange::combine, "weights"_a, "y"_a);
}
