// The pages of one layer, from Python's arrays.
#pragma once

#include "bind/arrays.h"
#include "ops/kv_view.h"

namespace ml::bind {

/// A view, and the arrays it points into.
struct KvPages {
  KvView view{};
  Array buffer;
  ReadArray key_scale, value_scale;
};

}  // namespace ml::bind
