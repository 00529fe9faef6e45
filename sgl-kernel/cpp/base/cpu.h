// Which instruction set the kernels use in this process.
#pragma once

#include <string>

namespace ml {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

/// The best one this machine has (avx512 means F, BW, DQ, VL, VBMI, BF16 and VNNI together).
Isa detected_isa();

/// The one in use: the detected one, or what MOONLANG_CPU_ISA or `force_isa` said. Costs one load.
Isa isa();

/// Throws std::invalid_argument for an unknown name or one this machine cannot run.
void force_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace ml
