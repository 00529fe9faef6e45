// How an op reaches the code for this machine's instruction set.
//
// ops/NAME.h           struct NameTable { ... function pointers ... };   ML_DECLARE_TABLE(NameTable, name)
// ops/NAME.inc.cpp     compiled once per instruction set with -DML_ISA=..; kernels live in namespace ml::ML_ISA; ends
// with
//                      const NameTable ml::ML_ISA::name_table = {...};
// a caller             ml::name_ops().function(...)
//
// An .inc.cpp must not use templates or inline functions from outside ml::ML_ISA that the compiler may emit out of line
// (std::vector, std::sort ...): the linker keeps one copy of them, perhaps the one with AVX-512 instructions.
// Base headers mark theirs ML_INLINE.
#pragma once

#include "base/cpu.h"

#ifdef ML_X86
#define ML_DECLARE_TABLE(Type, name)                                         \
  namespace ml::generic {                                                    \
  extern const Type name##_table;                                            \
  }                                                                          \
  namespace ml::avx2 {                                                       \
  extern const Type name##_table;                                            \
  }                                                                          \
  namespace ml::avx512 {                                                     \
  extern const Type name##_table;                                            \
  }                                                                          \
  namespace ml {                                                             \
  inline const Type& name##_ops() {                                          \
    const Isa chosen = isa();                                                \
    if (chosen == Isa::avx512) return avx512::name##_table;                  \
    return chosen == Isa::avx2 ? avx2::name##_table : generic::name##_table; \
  }                                                                          \
  }
#else
#define ML_DECLARE_TABLE(Type, name)                                \
  namespace ml::generic {                                           \
  extern const Type name##_table;                                   \
  }                                                                 \
  namespace ml {                                                    \
  inline const Type& name##_ops() { return generic::name##_table; } \
  }
#endif
