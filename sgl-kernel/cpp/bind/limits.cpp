// Calibration for the benchmarks.
#include "ops/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "base/arena.h"
#include "base/pool.h"
#include "base/types.h"
#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// GB/s of one pass over `bytes` of memory by all threads.
double read_gbs(int64_t bytes) {
  constexpr int64_t kPart = 1 << 20;
  static ml::Buffer memory;
  if (memory.bytes() < bytes) {
    memory = ml::Buffer(bytes);
    std::fill_n(static_cast<char*>(memory.data()), bytes, char{1});
  }
  std::atomic<uint64_t> seen{0};
  const auto start = Clock::now();
  ml::parallel(bytes / kPart, [&](int64_t i) {
    seen.fetch_xor(ml::limits_ops().read(static_cast<char*>(memory.data()) + i * kPart, kPart));
  });
  return double(bytes / kPart * kPart) / seconds_since(start) * 1e-9;
}

/// GFLOP/s of register arithmetic by all threads for about `rounds` / 300 us each.
double gflops(bool bf16, int64_t rounds) {
  std::atomic<int64_t> total{0};
  std::atomic<uint32_t> seen{0};
  const auto start = Clock::now();
  ml::parallel(int64_t{8} * ml::threads(), [&](int64_t) {
    int64_t operations = 0;
    const auto& ops = ml::limits_ops();
    const float value = bf16 ? ops.dot_bf16(rounds, &operations) : ops.fma_f32(rounds, &operations);
    seen.fetch_xor(ml::bit_cast<uint32_t>(value));
    total.fetch_add(operations);
  });
  return double(total.load()) / seconds_since(start) * 1e-9;
}

}  // namespace

ML_BIND(limits) {
  m.def("read_gbs", &read_gbs, "bytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "fma_gflops", [](int64_t rounds) { return gflops(false, rounds); }, "rounds"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "dot_gflops", [](int64_t rounds) { return gflops(true, rounds); }, "rounds"_a,
      nb::call_guard<nb::gil_scoped_release>());
}
