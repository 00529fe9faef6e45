// Quantised weights: kinds of PackedWeight that gemm() multiplies like the others.
//
//   W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k / group
//
// The kernels multiply x by the codes and apply zero and scale to the sums, in chunks of K of at most 128 (a group, or a
// part of one):
//
//   y[n] = sum over chunks c of  scale[n, c] * (sum over k in c of code[n, k] x[k]  -  zero[n, c] * sum of x over c)
//
// The sums of one chunk are exact (quant_fixed.h) or one chain in the order of K, and the chunks are added in order, for
// every number of rows. A weight in segments (gemm.h) is so many matrices beside each other, whose products are added as
// a tree. A segment may begin within a group: its first chunk is the rest of it.
//
// A panel has 32 columns, like those of pack.h, and is read front to back:
//
//   per segment: [scales | zeros] if one group covers K, then per chunk: [scales | zeros] otherwise, and units of four k:
//     int8   [32][4] bytes: code + 128
//     int4   [16][4] bytes: code + 8 of column c in the lower half, of column c + 16 in the upper
//     fp8    [2][32][2] bytes: pairs of k side by side, of columns 0-3, 16-19, 4-7, 20-23 ...
//   scales and zeros: float[32] each, zeros (whole numbers) only if any is not 0
//
// w8a8 quantises x too (int8, one scale per row) and adds up integers, so that every instruction set has the same sums:
//
//   per segment: float scales[32], int32 sums of codes [32], then per four k: [32][4] codes
//
// A segment of x has a scale of its own: so ranks that hold the segments need not know each other's x.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/gemm.h"

namespace ml {

constexpr int64_t kUnit = 4;       // K is padded to a multiple
constexpr int64_t kChunk = 128;  // longest chain of products
constexpr int64_t kScaleBytes = kPanel * 4;

/// A segment of K; all of it when the weight has one.
struct QuantLayout {
  DType codes = DType::i8;  ///< i8, fp8_e4m3 or fp8_e5m2
  bool zeros = false;
  int64_t k = 0;
  int64_t padded_k = 0;
  int64_t chunk = 0;   ///< K per chunk; the last one may be shorter
  int64_t lead = 0;    ///< by how much the first one is shorter
  int64_t chunks = 0;
  int64_t panel_offset = 0;    ///< where the segment begins in a panel
  int64_t head_bytes = 0;      ///< before the first chunk
  int64_t side_bytes = 0;      ///< scales and zeros of a chunk, before its codes
  int64_t chunk_bytes = 0;     ///< of a chunk that is not shorter
  int64_t lead_bytes = 0;      ///< by which the first one is shorter
  std::vector<int32_t> order;  ///< element of x that column k multiplies; empty: k

  int64_t begin(int64_t c) const { return c == 0 ? 0 : c * chunk - lead; }
  int64_t units(int64_t c) const { return ((c + 1 < chunks ? begin(c + 1) : padded_k) - begin(c)) / kUnit; }
  int64_t offset(int64_t c) const { return head_bytes + c * chunk_bytes - (c == 0 ? 0 : lead_bytes); }
  int64_t bytes() const;  ///< in a panel
};

/// What PackedWeight::extra points to for a quantised kind: one per segment.
using QuantSegments = std::vector<QuantLayout>;

inline const QuantSegments& quant_segments(const PackedWeight& w) {
  return *static_cast<const QuantSegments*>(w.extra.get());
}

/// Rows of codes with their scales, stacked along N.
struct QuantRows {
  const int8_t* codes;  ///< [rows, k]: int8, int4 as -8..7, or the bits of fp8
  int64_t ld;
  const float* scales;  ///< [rows, groups]
  const float* zeros;   ///< [rows, groups] or null
  int64_t rows;
};

/// How a matrix is quantised.
struct QuantForm {
  WeightKind kind;  ///< int8, int4, fp8 or w8a8
  DType codes;      ///< i8, fp8_e4m3 or fp8_e5m2
  int64_t group;    ///< K per scale; lead + k or more: one scale per row
  int64_t lead = 0;  ///< by how much the first group is shorter
  int64_t segments = 1;  ///< see PackedWeight; of a multiple of 4 elements each

  /// Scales per row.
  int64_t groups(int64_t k) const { return (lead + k + group - 1) / group; }
};

/// Why the kernels cannot take this form, or null. Groups longer than a chunk must be whole chunks, and a multiple of 4.
const char* why_not_packable(const QuantForm& form, int64_t k, bool zeros);

/// Shape, layout and sizes without memory. order: k elements or null, for one segment. Throws std::invalid_argument for
/// what why_not_packable names.
PackedWeight quantized_shape(const QuantForm& form, int64_t n, int64_t k, bool zeros, const int32_t* order, bool gated);

/// The form that w was packed in; groups of more than a chunk have become chunks.
QuantForm quant_form(const PackedWeight& w);

/// Packs in parallel. order: k elements or null. Throws std::invalid_argument for what why_not_packable names.
PackedWeight pack_quantized(const QuantForm& form, const std::vector<QuantRows>& sources, int64_t k,
                            const int32_t* order, bool gated, Arena& arena);

/// The kernels of w for the instruction set in use.
const TileOps& quant_tile_ops(const PackedWeight& w);

}  // namespace ml

ML_DECLARE_TABLE(TileOps, quant_int8)
ML_DECLARE_TABLE(TileOps, quant_int4)
ML_DECLARE_TABLE(TileOps, quant_e4m3)
ML_DECLARE_TABLE(TileOps, quant_e5m2)
ML_DECLARE_TABLE(TileOps, w8a8)
