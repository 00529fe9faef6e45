// What the files of Moe know of a run that nobody else needs to.
#pragma once

#include <cstdint>

#include "ops/moe.h"

namespace ml {

/// Some of the rows of a run, few enough for the scratch memory.
struct Moe::Part {
  const char* x;
  int64_t ldx;
  char* y;
  int64_t ldy;
  const char* residual;
  int64_t ld_residual;
  DType type;
  int64_t rows;

  const char* row(int64_t i) const { return x + i * ldx * bytes_of(type); }

  /// Rows [begin, end) of it, which leave their results at `to`, dense.
  Part some(int64_t begin, int64_t end, char* to, int64_t size) const {
    const int64_t bytes = bytes_of(type);
    return {row(begin), ldx, to, size, residual == nullptr ? nullptr : residual + begin * ld_residual * bytes,
            ld_residual, type, end - begin};
  }
};

/// Where the experts of each token are, and what they count.
struct Moe::Routed {
  float* logits;     // [rows, E]
  float* weights;    // [rows, per_token]
  int32_t* chosen;   // [rows, per_token]
  const void** z;    // [rows, per_token]: what they made of it
};

/// Where the expert that every token visits leaves its results.
struct Moe::Shared {
  char* inner;    // [rows, F]
  char* out;      // [rows, M]
  float* logits;  // [rows], of its gate
};

}  // namespace ml
