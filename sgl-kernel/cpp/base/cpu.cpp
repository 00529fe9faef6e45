#include "base/cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ml {
namespace {

Isa parse(const std::string& name) {
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "': use generic, avx2 or avx512");
}

Isa checked(const std::string& name) {
  const Isa wanted = parse(name);
  if (wanted > detected_isa()) throw std::invalid_argument("this machine has no " + name);
  return wanted;
}

Isa initial() {
  const char* forced = std::getenv("MOONLANG_CPU_ISA");
  return forced != nullptr && forced[0] != '\0' ? checked(forced) : detected_isa();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{initial()};
  return value;
}

}  // namespace

Isa detected_isa() {
#ifdef ML_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::generic;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void force_isa(const std::string& name) { current().store(checked(name), std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace ml
