// Packed weights in files: what sgl_kernel/cache.py is made of.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/checksum.h"
#include "base/mapped.h"
#include "base/pool.h"
#include "base/span.h"
#include "bind/arrays.h"
#include "bind/kinds.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace ml;
using ml::bind::refuse;

namespace {

constexpr int64_t kBlock = 4 << 20;  // bytes that one task checks or copies

using Bytes = nb::ndarray<nb::ro, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// The checksum of the checksums of all blocks: the same for any number of threads.
uint64_t block_checksum(const char* data, int64_t bytes) {
  const int64_t blocks = ceil_div(bytes, kBlock);
  std::vector<uint64_t> sums(static_cast<size_t>(blocks));
  parallel(blocks, [&](int64_t i) {
    sums[size_t(i)] = checksum(data + i * kBlock, std::min(kBlock, bytes - i * kBlock), uint64_t(i));
  });
  return checksum(sums.data(), blocks * int64_t(sizeof(uint64_t)), uint64_t(bytes));
}

void check_range(const MappedFile& file, int64_t offset, int64_t bytes) {
  if (offset < 0 || bytes < 0 || offset > file.bytes() || bytes > file.bytes() - offset) {
    refuse("range: not inside the file");
  }
}

/// All that its bytes do not say of a weight: the arguments of `restore`.
nb::dict form(const PackedWeight& w) {
  nb::dict d;
  d["kind"] = bind::kind_name(w);
  d["n"] = w.n;
  d["k"] = w.k;
  d["gated"] = w.gated;
  d["segments"] = w.segments;
  if (bind::is_dense(w.kind)) return d;
  const QuantLayout& q = quant_segments(w)[0];
  const QuantForm form = quant_form(w);
  d["group"] = form.group;
  d["lead"] = form.lead;
  d["zeros"] = q.zeros;
  if (!q.order.empty()) d["order"] = q.order;
  return d;
}

PackedWeight empty(const std::string& kind, int64_t n, int64_t k, bool gated, int64_t group, int64_t lead,
                   bool zeros, const std::optional<std::vector<int32_t>>& order, int64_t segments) {
  if (n < 1 || k < 1) refuse("n and k: must be positive");
  if (kind == "f32" || kind == "bf16") return packed_shape(bind::dense_kind(kind), n, k, gated, segments);
  if (order && int64_t(order->size()) != k) refuse("order: expected k elements");
  return quantized_shape(bind::quant_form(kind, group, lead, segments), n, k, zeros,
                         order ? order->data() : nullptr, gated);
}

/// A weight whose bytes lie in the file: there, or with `arena` copied.
PackedWeight restore(const std::shared_ptr<MappedFile>& file, int64_t offset, Arena* arena, const std::string& kind,
                     int64_t n, int64_t k, bool gated, int64_t group, int64_t lead, bool zeros,
                     const std::optional<std::vector<int32_t>>& order, int64_t segments) {
  PackedWeight w = empty(kind, n, k, gated, group, lead, zeros, order, segments);
  check_range(*file, offset, w.bytes);
  if (offset % 64 != 0) refuse("offset: must be a multiple of 64");
  char* const bytes = const_cast<char*>(file->data()) + offset;
  if (arena == nullptr) {
    w.memory = std::shared_ptr<void>(file, bytes);
    return w;
  }
  const nb::gil_scoped_release released;
  w.memory = arena->take(w.bytes);
  char* const to = static_cast<char*>(w.memory.get());
  parallel(ceil_div(w.bytes, kBlock), [&](int64_t i) {
    std::memcpy(to + i * kBlock, bytes + i * kBlock, size_t(std::min(kBlock, w.bytes - i * kBlock)));
  });
  return w;
}

}  // namespace

ML_BIND(stored) {
  nb::class_<MappedFile>(m, "MappedFile")
      .def_static("open", &MappedFile::open, "path"_a)
      .def_prop_ro("bytes", &MappedFile::bytes)
      .def_prop_ro("on_huge_pages", &MappedFile::on_huge_pages)
      .def(
          "checksum",
          [](const MappedFile& file, int64_t offset, int64_t bytes) {
            check_range(file, offset, bytes);
            const nb::gil_scoped_release released;
            return block_checksum(file.data() + offset, bytes);
          },
          "offset"_a, "bytes"_a)
      .def(
          "read",
          [](const MappedFile& file, int64_t offset, int64_t bytes) {
            check_range(file, offset, bytes);
            return nb::bytes(file.data() + offset, size_t(bytes));
          },
          "offset"_a, "bytes"_a);
  m.def(
      "block_checksum", [](const Bytes& b) { return block_checksum(reinterpret_cast<const char*>(b.data()), int64_t(b.size())); },
      "bytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("form", &form, "weight"_a);
  m.def("restore", &restore, "file"_a, "offset"_a, "arena"_a.none(), nb::kw_only(), "kind"_a, "n"_a, "k"_a, "gated"_a,
        "group"_a = 0, "lead"_a = 0, "zeros"_a = false, "order"_a = nb::none(), "segments"_a = 1);
}
