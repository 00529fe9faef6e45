// Quantised weights: kinds of PackedWeight that gemm() multiplies like the others.
//
//   W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k / group
//
// The kernels multiply x by the codes and apply zero and scale to the sums, in segments of K of at most 128 (a group,
// or a part of one):
//
//   y[n] = sum over segments s of  scale[n, s] * (sum over k in s of code[n, k] x[k]  -  zero[n, s] * sum of x over s)
//
// The sums of one segment are exact (quant_fixed.h) or one chain in the order of K, and the segments are added in
// order, for every number of rows.
//
// A panel has 32 columns, like those of pack.h, and is read front to back:
//
//   [scales | zeros] if one group covers K, then per segment: [scales | zeros] otherwise, and units of four k:
//     int8   [32][4] bytes: code + 128
//     int4   [16][4] bytes: code + 8 of column c in the lower half, of column c + 16 in the upper
//     fp8    [2][32][2] bytes: pairs of k side by side, of columns 0-3, 16-19, 4-7, 20-23 ...
//   scales and zeros: float[32] each, zeros (whole numbers) only if any is not 0
//
// w8a8 quantises x too (int8, one scale per row) and adds up integers, so that every instruction set has the same sums:
//
//   float scales[32], int32 sums of codes [32], then per four k: [32][4] codes
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/gemm.h"

namespace ml {

constexpr int64_t kUnit = 4;       // K is padded to a multiple
constexpr int64_t kSegment = 128;  // longest chain of products
constexpr int64_t kScaleBytes = kPanel * 4;

/// What PackedWeight::extra points to for a quantised kind.
struct QuantLayout {
  DType codes = DType::i8;  ///< i8, fp8_e4m3 or fp8_e5m2
  bool zeros = false;
  int64_t padded_k = 0;
  int64_t segment = 0;  ///< K per segment; the last one may be shorter
  int64_t segments = 0;
  int64_t head_bytes = 0;      ///< before the first segment
  int64_t side_bytes = 0;      ///< scales and zeros of a segment, before its codes
  int64_t segment_bytes = 0;   ///< from one segment to the next
  std::vector<int32_t> order;  ///< element of x that column k multiplies; empty: k

  int64_t units(int64_t s) const { return (s + 1 < segments ? segment : padded_k - s * segment) / kUnit; }
};

inline const QuantLayout& quant_layout(const PackedWeight& w) {
  return *static_cast<const QuantLayout*>(w.extra.get());
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
  int64_t group;    ///< K per scale; k or more: one scale per row
};

/// Why the kernels cannot take this form, or null. Groups longer than a segment must be whole segments, and a multiple
/// of 4.
const char* why_not_packable(const QuantForm& form, int64_t k, bool zeros);

/// Shape, layout and sizes without memory. order: k elements or null. Throws std::invalid_argument for what
/// why_not_packable names.
PackedWeight quantized_shape(const QuantForm& form, int64_t n, int64_t k, bool zeros, const int32_t* order, bool gated);

/// The form that w was packed in; groups of more than a segment have become segments.
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
