#include "bind/kv_view.h"

#include <nanobind/stl/optional.h>

#include <optional>

#include "bind/module.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::bind::Array;
using ml::bind::KvPages;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

const float* scales(const std::optional<ReadArray>& given, const char* name, int heads, ReadArray* kept) {
  if (!given) return nullptr;
  const void* data = ml::bind::vector(*given, name, ml::DType::f32, heads);
  *kept = *given;
  return static_cast<const float*>(data);
}

/// buffer: [P, L, 2, K, p, D], or of an absorbed latent [P, L, p, D].
void init(KvPages* self, const Array& buffer, int layer, int key_dim, int value_dim, bool inline_scales,
          const std::optional<ReadArray>& key_scale, const std::optional<ReadArray>& value_scale) {
  const bool latent = buffer.ndim() == 4;
  if (!latent && (buffer.ndim() != 6 || buffer.shape(2) != 2))
    refuse("buffer must be [P, L, 2, K, p, D] or [P, L, p, D]");
  const size_t last = buffer.ndim() - 1;
  if (buffer.stride(last) != 1) refuse("buffer: the numbers of a token must be contiguous");
  if (layer < 0 || layer >= int(buffer.shape(1))) refuse("no such layer");
  ml::KvView view{};
  view.type = ml::bind::dtype_of(buffer, "buffer");
  const int64_t size = ml::bytes_of(view.type);
  view.inline_scales = inline_scales;
  view.key_dim = key_dim;
  view.value_dim = value_dim;
  const int64_t row = int64_t(buffer.shape(last)) - (inline_scales ? int64_t{sizeof(float)} / size : 0);
  if (key_dim < 1 || value_dim < 1 || std::max(key_dim, value_dim) > row)
    refuse("buffer: its last dimension is too small");
  if (inline_scales && (key_dim != row || value_dim != row))
    refuse("inline scales stand behind the last number of a row");
  view.base = static_cast<char*>(buffer.data());
  view.page_stride = buffer.stride(0) * size;
  view.key_offset = layer * buffer.stride(1) * size;
  view.value_offset = view.key_offset + (latent ? 0 : buffer.stride(2) * size);
  view.heads = latent ? 1 : int32_t(buffer.shape(3));
  view.head_stride = latent ? 0 : buffer.stride(3) * size;
  view.page_tokens = int32_t(buffer.shape(last - 1));
  view.token_stride = buffer.stride(last - 1) * size;
  new (self) KvPages{view, buffer, {}, {}};
  self->view.key_scale = scales(key_scale, "key_scale", view.heads, &self->key_scale);
  self->view.value_scale = scales(value_scale, "value_scale", view.heads, &self->value_scale);
}

}  // namespace

ml::DType ml::bind::pool_dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  if (name == "float8_e4m3fn") return DType::fp8_e4m3;
  if (name == "float8_e5m2") return DType::fp8_e5m2;
  if (name == "int8") return DType::i8;
  refuse("no pool has the type " + name);
}

ML_BIND(kv_view) {
  nb::class_<KvPages>(m, "KvPages")
      .def("__init__", &init, "buffer"_a, "layer"_a, "key_dim"_a, "value_dim"_a, "inline_scales"_a,
           "key_scale"_a.none(), "value_scale"_a.none())
      .def_prop_ro("heads", [](const KvPages& self) { return self.view.heads; })
      .def_prop_ro("page_tokens", [](const KvPages& self) { return self.view.page_tokens; })
      .def_prop_ro("address", [](const KvPages& self) { return reinterpret_cast<uintptr_t>(&self.view); });
}
