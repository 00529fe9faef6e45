#include "ops/pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/pool.h"
#include "base/span.h"
#include "ops/convert.h"

namespace ml {
namespace {

constexpr int64_t kTile = 64;  // elements of K handled at a time: the 32 source lines of a tile stay in L1

const char* row_address(const std::vector<Rows>& sources, int64_t row, DType* type) {
  for (const Rows& source : sources) {
    if (row < source.rows) {
      *type = source.type;
      return static_cast<const char*>(source.data) + row * source.ld * bytes_of(source.type);
    }
    row -= source.rows;
  }
  throw std::logic_error("row beyond the sources");
}

/// Elements [k0, k0 + count) of a row as T, zero-filled up to kTile.
template <class T>
void read_elements(const char* row, DType from, DType to, int64_t k0, int64_t count, T* out) {
  if (count < kTile) std::memset(out, 0, size_t(kTile) * sizeof(T));
  const char* const start = row + k0 * bytes_of(from);
  if (from == to) {
    std::memcpy(out, start, size_t(count) * sizeof(T));
    return;
  }
  float wide[kTile];
  convert_ops().to_f32(start, from, wide, count);
  convert_ops().from_f32(wide, out, to, count);
}

// Four units side by side: GCC's vectors, so that every machine's smallest vector instructions do it.
using Four = uint32_t __attribute__((vector_size(16)));
constexpr int64_t kUnits = kTile;  // most units of a tile: elements of a float panel

/// lines[u][c] = columns[c][u]: 4 x 4 units at a time, in registers.
void transpose(const uint32_t (&columns)[kPanel][kUnits], int64_t units, uint32_t* lines) {
  for (int64_t u = 0; u < units; u += 4) {
    const int64_t count = std::min<int64_t>(4, units - u);
    for (int64_t c = 0; c < kPanel; c += 4) {
      Four in[4], half[4], out[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&in[i], &columns[c + i][u], sizeof(Four));
      half[0] = __builtin_shuffle(in[0], in[1], Four{0, 4, 1, 5});
      half[1] = __builtin_shuffle(in[0], in[1], Four{2, 6, 3, 7});
      half[2] = __builtin_shuffle(in[2], in[3], Four{0, 4, 1, 5});
      half[3] = __builtin_shuffle(in[2], in[3], Four{2, 6, 3, 7});
      out[0] = __builtin_shuffle(half[0], half[2], Four{0, 1, 4, 5});
      out[1] = __builtin_shuffle(half[0], half[2], Four{2, 3, 6, 7});
      out[2] = __builtin_shuffle(half[1], half[3], Four{0, 1, 4, 5});
      out[3] = __builtin_shuffle(half[1], half[3], Four{2, 3, 6, 7});
      for (int64_t i = 0; i < count; ++i) std::memcpy(lines + (u + i) * kPanel + c, &out[i], sizeof(Four));
    }
  }
}

void pack_panel(const PackedWeight& w, const std::vector<Rows>& sources, int64_t panel) {
  const char* row[kPanel];
  DType type[kPanel];
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t source = w.source_row(panel, c);
    row[c] = source < 0 ? nullptr : row_address(sources, source, &type[c]);
  }
  // A unit is what one column has in one line of the panel: a float, or a pair of bf16 (also 32 bits).
  uint32_t* const out = reinterpret_cast<uint32_t*>(const_cast<char*>(w.panel(panel)));
  const bool f32 = w.kind == WeightKind::f32;
  const int64_t per_unit = f32 ? 1 : 2;
  alignas(64) uint32_t columns[kPanel][kUnits] = {};  // what has no source stays zero
  for (int64_t k0 = 0; k0 < w.k; k0 += kTile) {
    const int64_t count = std::min(w.k - k0, kTile);
    for (int64_t c = 0; c < kPanel; ++c) {
      if (row[c] == nullptr) continue;
      if (f32) {
        read_elements(row[c], type[c], DType::f32, k0, count, reinterpret_cast<float*>(columns[c]));
      } else {
        read_elements(row[c], type[c], DType::bf16, k0, count, reinterpret_cast<bf16*>(columns[c]));
      }
    }
    transpose(columns, ceil_div(count, per_unit), out + k0 / per_unit * kPanel);
  }
}

}  // namespace

int64_t PackedWeight::source_row(int64_t i, int64_t c) const {
  const int64_t column = i * panel_columns() + c % panel_columns();
  if (column >= columns()) return -1;
  return c < panel_columns() ? column : columns() + column;
}

PackedWeight packed_shape(WeightKind kind, int64_t n, int64_t k, bool gated, int64_t segments) {
  if (gated && n % 2 != 0) throw std::invalid_argument("a gated weight needs an even number of rows (gate and up)");
  if (segments < 1 || segments > kMostSegments || (segments & (segments - 1)) != 0) {
    throw std::invalid_argument("segments: expected 1, 2, 4 or 8");
  }
  if (segments > 1 && k % (2 * segments) != 0) {
    throw std::invalid_argument("segments: each needs an even number of elements of K");
  }
  PackedWeight w;
  w.kind = kind;
  w.gated = gated;
  w.n = n;
  w.k = k;
  w.segments = segments;
  w.panels = ceil_div(w.columns(), w.panel_columns());
  w.panel_bytes = kPanel * (kind == WeightKind::f32 ? k * 4 : ceil_div(k, 2) * 4);
  w.bytes = w.panels * w.panel_bytes;
  return w;
}

PackedWeight pack(const std::vector<Rows>& sources, int64_t k, WeightKind kind, bool gated, Arena& arena,
                  int64_t segments) {
  int64_t n = 0;
  for (const Rows& source : sources) n += source.rows;
  PackedWeight w = packed_shape(kind, n, k, gated, segments);
  w.memory = arena.take(w.bytes);
  parallel(w.panels, [&](int64_t panel) { pack_panel(w, sources, panel); });
  return w;
}

}  // namespace ml
