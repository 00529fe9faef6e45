#include "ops/quant.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

QuantLayout layout_of(const QuantForm& form, int64_t k, bool zeros) {
  QuantLayout q;
  q.codes = form.codes;
  q.zeros = zeros;
  q.padded_k = round_up(k, kUnit);
  if (form.kind == WeightKind::w8a8) {
    q.segment = q.padded_k;
    q.segments = 1;
    q.head_bytes = 2 * kScaleBytes;
    q.segment_bytes = q.padded_k * kPanel;
    return q;
  }
  const bool one_group = form.group >= k;
  q.segment = std::min(one_group ? q.padded_k : form.group, kSegment);
  q.segments = ceil_div(q.padded_k, q.segment);
  const int64_t side = kScaleBytes * (zeros ? 2 : 1);
  q.head_bytes = one_group ? side : 0;
  q.side_bytes = one_group ? 0 : side;
  q.segment_bytes = q.side_bytes + q.segment * kPanel / (form.kind == WeightKind::int4 ? 2 : 1);
  return q;
}

/// One row of the sources.
struct SourceRow {
  const int8_t* codes;
  const float* scales;
  const float* zeros;
};

SourceRow source_row(const std::vector<QuantRows>& sources, int64_t row, int64_t groups) {
  for (const QuantRows& source : sources) {
    if (row < source.rows) {
      return {source.codes + row * source.ld, source.scales + row * groups,
              source.zeros == nullptr ? nullptr : source.zeros + row * groups};
    }
    row -= source.rows;
  }
  throw std::logic_error("row beyond the sources");
}

/// Writes `count` codes of column c into units from `out` on.
void pack_codes(WeightKind kind, const int8_t* codes, int64_t count, int64_t c, char* out) {
  if (kind == WeightKind::int4) {
    for (int64_t k = 0; k < count; ++k) {
      char* const byte = out + k / 4 * 64 + 4 * (c % 16) + k % 4;
      *byte = char(*byte | (codes[k] + 8) << (4 * (c / 16)));
    }
  } else if (kind == WeightKind::fp8) {
    const int64_t place = c % 16 / 4 * 8 + c % 4 + c / 16 * 4;
    for (int64_t k = 0; k < count; ++k) out[k / 2 * 2 * kPanel + 2 * place + k % 2] = char(codes[k]);
  } else {
    const int offset = kind == WeightKind::int8 ? 128 : 0;
    for (int64_t k = 0; k < count; ++k) out[k / 4 * 4 * kPanel + 4 * c + k % 4] = char(codes[k] + offset);
  }
}

void pack_column(const PackedWeight& w, const QuantLayout& q, const SourceRow& row, int64_t group, int64_t c,
                 char* panel) {
  float* const head = reinterpret_cast<float*>(panel);
  if (q.head_bytes > 0) head[c] = row.scales[0];
  if (w.kind == WeightKind::w8a8) {
    int32_t sum = 0;
    for (int64_t k = 0; k < w.k; ++k) sum += row.codes[k];
    reinterpret_cast<int32_t*>(panel + kScaleBytes)[c] = sum;
  } else if (q.head_bytes > 0 && q.zeros && row.zeros != nullptr) {
    head[kPanel + c] = row.zeros[0];
  }
  for (int64_t s = 0; s < q.segments; ++s) {
    char* const at = panel + q.head_bytes + s * q.segment_bytes;
    const int64_t first = s * q.segment;
    if (q.side_bytes > 0) {
      float* const side = reinterpret_cast<float*>(at);
      side[c] = row.scales[first / group];
      if (q.zeros && row.zeros != nullptr) side[kPanel + c] = row.zeros[first / group];
    }
    pack_codes(w.kind, row.codes + first, std::min(q.segment, w.k - first), c, at + q.side_bytes);
  }
}

}  // namespace

const char* why_not_packable(const QuantForm& form, int64_t k, bool zeros) {
  if (form.kind == WeightKind::w8a8 && (form.group < k || zeros))
    return "w8a8 has one scale per row and no zero points";
  if (form.group >= k) return nullptr;
  if (form.group < kUnit || form.group % kUnit != 0) return "the group is not a multiple of 4";
  if (form.group > kSegment && form.group % kSegment != 0) return "a group of more than 128 is not a multiple of 128";
  return nullptr;
}

PackedWeight quantized_shape(const QuantForm& form, int64_t n, int64_t k, bool zeros, const int32_t* order,
                             bool gated) {
  const char* const why_not = why_not_packable(form, k, zeros);
  if (why_not != nullptr) throw std::invalid_argument(why_not);
  auto layout = std::make_shared<QuantLayout>(layout_of(form, k, zeros));
  if (order != nullptr) layout->order.assign(order, order + k);
  PackedWeight w = packed_shape(WeightKind::bf16, n, k, gated);
  w.kind = form.kind;
  const int64_t padding = (layout->segments * layout->segment - layout->padded_k) * kPanel;
  const int64_t saved = padding / (form.kind == WeightKind::int4 ? 2 : 1);
  w.panel_bytes = round_up(layout->head_bytes + layout->segments * layout->segment_bytes - saved, 64);
  w.bytes = w.panels * w.panel_bytes;
  w.extra = std::move(layout);
  return w;
}

QuantForm quant_form(const PackedWeight& w) {
  const QuantLayout& q = quant_layout(w);
  return {w.kind, q.codes, q.side_bytes > 0 ? q.segment : w.k};
}

PackedWeight pack_quantized(const QuantForm& form, const std::vector<QuantRows>& sources, int64_t k,
                            const int32_t* order, bool gated, Arena& arena) {
  int64_t n = 0;
  bool zeros = false;
  for (const QuantRows& source : sources) {
    n += source.rows;
    zeros = zeros || source.zeros != nullptr;
  }
  PackedWeight w = quantized_shape(form, n, k, zeros, order, gated);
  w.memory = arena.take(w.bytes);
  const QuantLayout& layout = quant_layout(w);
  const int64_t groups = form.group >= k ? 1 : ceil_div(k, form.group);
  parallel(w.panels, [&](int64_t panel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t row = w.source_row(panel, c);
      if (row < 0) continue;  // zero codes with scale zero
      pack_column(w, layout, source_row(sources, row, groups), form.group, c, const_cast<char*>(w.panel(panel)));
    }
  });
  return w;
}

const TileOps& quant_tile_ops(const PackedWeight& w) {
  switch (w.kind) {
    case WeightKind::int8:
      return quant_int8_ops();
    case WeightKind::int4:
      return quant_int4_ops();
    case WeightKind::w8a8:
      return w8a8_ops();
    default:
      return quant_layout(w).codes == DType::fp8_e4m3 ? quant_e4m3_ops() : quant_e5m2_ops();
  }
}

}  // namespace ml
