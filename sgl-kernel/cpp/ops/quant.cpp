#include "ops/quant.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

/// One segment: columns [begin, begin + k) of `whole`.
QuantLayout layout_of(const QuantForm& form, int64_t whole, int64_t begin, int64_t k, bool zeros) {
  QuantLayout q;
  q.codes = form.codes;
  q.zeros = zeros;
  q.k = k;
  q.padded_k = round_up(k, kUnit);
  if (form.kind == WeightKind::w8a8) {
    q.chunk = q.padded_k;
    q.chunks = 1;
    q.head_bytes = 2 * kScaleBytes;
    q.chunk_bytes = q.padded_k * kPanel;
    return q;
  }
  const bool one_group = form.groups(whole) == 1;
  const int64_t per_byte = form.kind == WeightKind::int4 ? 2 : 1;
  q.chunk = std::min(one_group ? q.padded_k : form.group, kChunk);
  q.lead = one_group ? 0 : (form.lead + begin) % q.chunk;
  q.chunks = ceil_div(q.lead + q.padded_k, q.chunk);
  const int64_t side = kScaleBytes * (zeros ? 2 : 1);
  q.head_bytes = one_group ? side : 0;
  q.side_bytes = one_group ? 0 : side;
  q.chunk_bytes = q.side_bytes + q.chunk * kPanel / per_byte;
  q.lead_bytes = q.lead * kPanel / per_byte;
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

/// Column c of a segment whose first code is begin.
void pack_column(const QuantForm& form, const QuantLayout& q, const SourceRow& row, int64_t begin, int64_t c,
                 char* panel) {
  float* const head = reinterpret_cast<float*>(panel);
  if (q.head_bytes > 0) head[c] = row.scales[0];
  if (form.kind == WeightKind::w8a8) {
    int32_t sum = 0;
    for (int64_t k = 0; k < q.k; ++k) sum += row.codes[begin + k];
    reinterpret_cast<int32_t*>(panel + kScaleBytes)[c] = sum;
  } else if (q.head_bytes > 0 && q.zeros && row.zeros != nullptr) {
    head[kPanel + c] = row.zeros[0];
  }
  for (int64_t s = 0; s < q.chunks; ++s) {
    char* const at = panel + q.offset(s);
    const int64_t first = q.begin(s);
    if (q.side_bytes > 0) {
      const int64_t group = (form.lead + begin + first) / form.group;
      float* const side = reinterpret_cast<float*>(at);
      side[c] = row.scales[group];
      if (q.zeros && row.zeros != nullptr) side[kPanel + c] = row.zeros[group];
    }
    pack_codes(form.kind, row.codes + begin + first, std::min(q.units(s) * kUnit, q.k - first), c, at + q.side_bytes);
  }
}

}  // namespace

int64_t QuantLayout::bytes() const {
  const int64_t codes_bytes = (chunk_bytes - side_bytes) * padded_k / chunk;  // units are whole bytes
  return round_up(head_bytes + chunks * side_bytes + codes_bytes, 64);
}

const char* why_not_packable(const QuantForm& form, int64_t k, bool zeros) {
  const bool one_group = form.groups(k) == 1;
  if (form.kind == WeightKind::w8a8 && (!one_group || zeros)) return "w8a8 has one scale per row and no zero points";
  if (k % form.segments != 0 || (form.segments > 1 && k % (form.segments * kUnit) != 0))
    return "the segments are no multiples of 4";
  if (one_group) return nullptr;
  if (form.group < kUnit || form.group % kUnit != 0 || form.lead % kUnit != 0) return "the group is not a multiple of 4";
  if (form.group > kChunk && form.group % kChunk != 0) return "a group of more than 128 is not a multiple of 128";
  return nullptr;
}

PackedWeight quantized_shape(const QuantForm& form, int64_t n, int64_t k, bool zeros, const int32_t* order,
                             bool gated) {
  const char* const why_not = why_not_packable(form, k, zeros);
  if (why_not != nullptr) throw std::invalid_argument(why_not);
  if (order != nullptr && form.segments > 1) throw std::invalid_argument("columns in another order have one segment");
  PackedWeight w = packed_shape(WeightKind::bf16, n, k, gated, form.segments);
  w.kind = form.kind;
  auto layouts = std::make_shared<QuantSegments>();
  const int64_t part = k / form.segments;
  w.panel_bytes = 0;
  for (int64_t s = 0; s < form.segments; ++s) {
    QuantLayout q = layout_of(form, k, s * part, part, zeros);
    q.panel_offset = w.panel_bytes;
    w.panel_bytes += q.bytes();
    layouts->push_back(std::move(q));
  }
  if (order != nullptr) (*layouts)[0].order.assign(order, order + k);
  w.bytes = w.panels * w.panel_bytes;
  w.extra = std::move(layouts);
  return w;
}

QuantForm quant_form(const PackedWeight& w) {
  const QuantLayout& q = quant_segments(w)[0];
  return {w.kind, q.codes, q.side_bytes > 0 ? q.chunk : w.k, q.lead, w.segments};
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
  const int64_t groups = form.groups(k);
  parallel(w.panels, [&](int64_t panel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t row = w.source_row(panel, c);
      if (row < 0) continue;  // zero codes with scale zero
      const SourceRow source = source_row(sources, row, groups);
      int64_t begin = 0;
      for (const QuantLayout& q : quant_segments(w)) {
        pack_column(form, q, source, begin, c, const_cast<char*>(w.panel(panel)) + q.panel_offset);
        begin += q.k;
      }
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
      return quant_segments(w)[0].codes == DType::fp8_e4m3 ? quant_e4m3_ops() : quant_e5m2_ops();
  }
}

}  // namespace ml
