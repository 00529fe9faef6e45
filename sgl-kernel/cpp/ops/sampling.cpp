#include "ops/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

constexpr int64_t kTaskTokens = 128 << 10;  // whose largest logit is found in some 20 us
constexpr float kNever = -std::numeric_limits<float>::infinity();

/// The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

void sample_row(const SampleBatch& batch, int64_t row) {
  const SamplingOps& ops = sampling_ops();
  const float* logits = batch.logits + row * batch.ld;
  float peak;
  int64_t token = ops.argmax(logits, batch.vocab, &peak);
  if (batch.temperature[row] > 0.0f && std::isfinite(peak)) {
    const SampleParams params = {batch.temperature[row], batch.top_k[row], batch.top_p[row], batch.min_p[row],
                                 uniform(batch.seeds[row], batch.positions[row])};
    token = ops.draw(logits, batch.vocab, peak, params, scratch(ops.workspace(batch.vocab)));
  }
  batch.tokens[row] = token;
  batch.peaks[row] = peak;
}

}  // namespace

double uniform(int64_t seed, int64_t position) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  const uint64_t bits = mix(mix(uint64_t(seed) + kGolden) + uint64_t(position) * kGolden);
  return double(bits >> 11) * 0x1p-53;
}

void sample(const SampleBatch& batch) {
  if (batch.rows == 1) return sample_row(batch, 0);
  parallel(batch.rows, [&](int64_t row) { sample_row(batch, row); });
}

void argmax(const float* logits, int64_t rows, int64_t vocab, int64_t* tokens, float* peaks) {
  const SamplingOps& ops = sampling_ops();
  const int64_t step = std::max<int64_t>(1, kTaskTokens / vocab);
  parallel(ceil_div(rows, step), [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      tokens[row] = ops.argmax(logits + row * vocab, vocab, peaks + row);
    }
  });
}

void log_probabilities(const float* logits, int64_t vocab, const LogprobQuery& query) {
  const SamplingOps& ops = sampling_ops();
  ops.log_probabilities(logits, vocab, query, scratch(ops.workspace(vocab)));
  std::vector<std::pair<float, int32_t>> best;
  best.reserve(size_t(query.top));
  for (int64_t i = 0; i < query.top; ++i) best.emplace_back(-query.top_values[i], query.top_ids[i]);
  std::sort(best.begin(), best.end());
  for (int64_t i = 0; i < query.top; ++i) {
    query.top_values[i] = -best[size_t(i)].first;
    query.top_ids[i] = best[size_t(i)].second;
  }
}

void apply_bitmask(float* logits, int64_t vocab, const int32_t* bits) {
  for (int64_t first = 0; first < vocab; first += 32) {
    const uint32_t word = uint32_t(bits[first / 32]);
    const int64_t last = std::min(vocab, first + 32);
    if (word == 0) {
      std::fill(logits + first, logits + last, kNever);
    } else if (word != ~0u) {
      for (int64_t t = first; t < last; ++t) {
        if ((word >> (t - first) & 1u) == 0) logits[t] = kNever;
      }
    }
  }
}

void penalise(float* logits, const int64_t* ids, const float* counts, int64_t n, const Penalties& penalties) {
  for (int64_t i = 0; i < n; ++i) {
    float value = logits[ids[i]] - penalties.frequency * counts[i];
    if (counts[i] > 0.0f) value -= penalties.presence;
    if (penalties.repetition != 1.0f)
      value = value > 0.0f ? value / penalties.repetition : value * penalties.repetition;
    logits[ids[i]] = value;
  }
}

}  // namespace ml
