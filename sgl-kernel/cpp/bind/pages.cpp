// Page copies and checksums.
#include "ops/pages.h"

#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bind/arrays.h"
#include "bind/module.h"
#include "ops/xxh3.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::bind::Array;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

struct Pages {
  ml::PageMemory memory;
  int64_t count, bytes;
};

/// An array [P, ...] whose pages are contiguous.
template <class A>
Pages pages_of(const A& array, const char* name) {
  if (array.ndim() < 2) refuse(std::string(name) + ": expected [pages, ...]");
  int64_t numbers = 1;
  for (size_t i = array.ndim() - 1; i > 0; --i) {
    if (array.shape(i) > 1 && array.stride(i) != numbers) refuse(std::string(name) + ": a page must be contiguous");
    numbers *= int64_t(array.shape(i));
  }
  const int64_t size = int64_t(array.itemsize());
  char* base = static_cast<char*>(const_cast<void*>(static_cast<const void*>(array.data())));
  return {{base, array.stride(0) * size}, int64_t(array.shape(0)), numbers * size};
}

const int32_t* checked_ids(const ReadArray& ids, const char* name, int64_t count, int64_t pages) {
  const auto* data = static_cast<const int32_t*>(ml::bind::vector(ids, name, ml::DType::i32, count));
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] < 0 || data[i] >= pages) refuse(std::string(name) + ": no such page");
  }
  return data;
}

uint64_t* checked_sums(const nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& sums, int64_t count) {
  if (int64_t(sums.shape(0)) != count) refuse("sums: one per page");
  return sums.data();
}

using Sums = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void copy_pages(const ReadArray& from, const ReadArray& from_ids, const Array& to, const ReadArray& to_ids,
                const std::optional<Sums>& sums, uint64_t seed) {
  const Pages source = pages_of(from, "source"), target = pages_of(to, "target");
  if (source.bytes != target.bytes) refuse("source and target pages differ in size");
  const int64_t count = int64_t(from_ids.shape(0));
  const int32_t* source_ids = checked_ids(from_ids, "source_ids", count, source.count);
  const int32_t* target_ids = checked_ids(to_ids, "target_ids", count, target.count);
  uint64_t* out = sums ? checked_sums(*sums, count) : nullptr;
  nb::gil_scoped_release release;
  ml::copy_pages(source.memory, source_ids, target.memory, target_ids, count, source.bytes, out, seed);
}

void sum_pages(const ReadArray& from, const ReadArray& ids, const Sums& sums, uint64_t seed) {
  const Pages source = pages_of(from, "source");
  const int64_t count = int64_t(ids.shape(0));
  const int32_t* source_ids = checked_ids(ids, "ids", count, source.count);
  uint64_t* out = checked_sums(sums, count);
  nb::gil_scoped_release release;
  ml::sum_pages(source.memory, source_ids, count, source.bytes, out, seed);
}

/// Pages somewhere in memory, `stride` bytes apart. The caller answers for the addresses.
ml::PageMemory memory_at(uint64_t address, int64_t stride, int64_t bytes, const char* name) {
  if (bytes < 0 || stride < bytes) refuse(std::string(name) + ": pages overlap");
  return {reinterpret_cast<char*>(address), stride};
}

const int32_t* raw_ids(const ReadArray& ids, const char* name, int64_t count) {
  return checked_ids(ids, name, count, int64_t{INT32_MAX} + 1);
}

void copy_at(uint64_t from, int64_t from_stride, const ReadArray& from_ids, uint64_t to, int64_t to_stride,
             const ReadArray& to_ids, int64_t bytes, const std::optional<Sums>& sums, uint64_t seed) {
  const ml::PageMemory source = memory_at(from, from_stride, bytes, "source");
  const ml::PageMemory target = memory_at(to, to_stride, bytes, "target");
  const int64_t count = int64_t(from_ids.shape(0));
  const int32_t* source_ids = raw_ids(from_ids, "source_ids", count);
  const int32_t* target_ids = raw_ids(to_ids, "target_ids", count);
  uint64_t* out = sums ? checked_sums(*sums, count) : nullptr;
  nb::gil_scoped_release release;
  ml::copy_pages(source, source_ids, target, target_ids, count, bytes, out, seed);
}

void sum_at(uint64_t from, int64_t stride, const ReadArray& ids, int64_t bytes, const Sums& sums, uint64_t seed) {
  const ml::PageMemory source = memory_at(from, stride, bytes, "source");
  const int64_t count = int64_t(ids.shape(0));
  const int32_t* source_ids = raw_ids(ids, "ids", count);
  uint64_t* out = checked_sums(sums, count);
  nb::gil_scoped_release release;
  ml::sum_pages(source, source_ids, count, bytes, out, seed);
}

using Parts = nb::ndarray<const uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

/// parts: [n, k, 3], the address of each part of each page, where it is copied to (0: nowhere), and its bytes.
void move_parts(const Parts& parts, const Sums& sums) {
  const int64_t count = int64_t(parts.shape(0)), each = int64_t(parts.shape(1));
  if (parts.shape(2) != 3) refuse("parts: expected [pages, parts, (from, to, bytes)]");
  uint64_t* out = checked_sums(sums, count);
  std::vector<ml::SummedPart> all(static_cast<size_t>(count * each));
  for (int64_t i = 0; i < count * each; ++i) {
    const uint64_t* part = parts.data() + 3 * i;
    if (part[2] == 0 || part[2] % uint64_t(ml::kXxh3Stripe) != 0) refuse("parts: bytes must be a multiple of 64");
    all[size_t(i)] = {reinterpret_cast<const char*>(part[0]), reinterpret_cast<char*>(part[1]), int64_t(part[2])};
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t bytes = 0;
    for (int64_t k = 0; k < each; ++k) bytes += all[size_t(i * each + k)].bytes;
    if (bytes < ml::kXxh3Least) refuse("parts: a page has at least 241 bytes");
  }
  nb::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) out[i] = ml::xxh3_ops().sum(all.data() + i * each, each);
}

}  // namespace

ML_BIND(pages) {
  m.def("move_parts", &move_parts, "parts"_a, "sums"_a);
  m.def("copy_at", &copy_at, "source"_a, "source_stride"_a, "source_ids"_a, "target"_a, "target_stride"_a,
        "target_ids"_a, "bytes"_a, "sums"_a.none(), "seed"_a);
  m.def("sum_at", &sum_at, "source"_a, "stride"_a, "ids"_a, "bytes"_a, "sums"_a, "seed"_a);
  m.def("copy_pages", &copy_pages, "source"_a, "source_ids"_a, "target"_a, "target_ids"_a, "sums"_a.none(), "seed"_a);
  m.def("sum_pages", &sum_pages, "source"_a, "ids"_a, "sums"_a, "seed"_a);
}
