// Where the keys and values of one layer lie.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace ml {

/// The pages of one layer. All strides and offsets in bytes.
struct KvView {
  char* base;           // page 0
  int64_t page_stride;  // from page to page
  int64_t key_offset;   // from the start of a page to the first key of this layer; MLA: value_offset is the same
  int64_t value_offset;
  int64_t head_stride;
  int64_t token_stride;
  int32_t heads;
  int32_t page_tokens;
  int32_t key_dim;
  int32_t value_dim;
  DType type;
  bool inline_scales;        // each row of numbers is followed by its own float32 scale
  const float* key_scale;    // [heads], or null for 1: stored number times scale is the key
  const float* value_scale;  // [heads], or null
};

}  // namespace ml
