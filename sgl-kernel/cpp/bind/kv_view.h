// The pages of one layer, from Python's arrays.
#pragma once

#include <string>

#include "bind/arrays.h"
#include "ops/kv_view.h"

namespace ml::bind {

/// A view, and the arrays it points into.
struct KvPages {
  KvView view{};
  Array buffer;
  ReadArray key_scale, value_scale;
};

/// Element types that a pool may have, by their torch names; a ValueError for others.
DType pool_dtype_named(const std::string& name);

}  // namespace ml::bind
