// From one row of logits to a token or to log probabilities, without sorting the vocabulary.
//
// The semantics are those of python/moonlang/layers/sampler.py: softmax with temperature, then top_k, top_p and min_p,
// all three judged on the unfiltered distribution, equal probabilities ranked by token id, and the inverse of the
// cumulative distribution in vocabulary order at a uniform number that is a hash of (seed, position). A row's result
// depends on nothing but the row.
#pragma once

#include <cstdint>

#include "ops/table.h"

namespace ml {

struct SampleParams {
  float temperature;  // 0 takes the largest
  int64_t top_k;      // 0 keeps all
  double top_p;       // in (0, 1]
  float min_p;        // in [0, 1]
  double uniform;     // in [0, 1)
};

/// What a request wants to know of one distribution; see log_probabilities.
struct LogprobQuery {
  float temperature;
  int64_t top;  // <= vocab
  float* top_values;
  int32_t* top_ids;
  const int64_t* ids;  // [id_count]
  int64_t id_count;
  float* id_values;
};

struct SamplingOps {
  /// The first index of the largest value; *peak is that value, or NaN when the row holds one.
  int64_t (*argmax)(const float* logits, int64_t vocab, float* peak);

  /// Bytes that the two functions below want as `workspace`, aligned to 64.
  int64_t (*workspace)(int64_t vocab);

  /// A token, given the finite largest logit.
  int64_t (*draw)(const float* logits, int64_t vocab, float peak, const SampleParams& params, void* workspace);

  /// Fills the query's values; the `top` most probable tokens come in no particular order.
  void (*log_probabilities)(const float* logits, int64_t vocab, const LogprobQuery& query, void* workspace);
};

/// In [0, 1): a hash of (seed, position), as sampler.uniforms.
double uniform(int64_t seed, int64_t position);

/// Sample one token per row. Everything [rows]; logits: rows of vocab, ld apart. peaks receives the largest logit of
/// each row: where it is not finite (NaN if there is one in the row), the token means nothing.
struct SampleBatch {
  const float* logits;
  int64_t rows, vocab, ld;
  const float* temperature;
  const int64_t* top_k;
  const double* top_p;
  const float* min_p;
  const int64_t* seeds;
  const int64_t* positions;
  int64_t* tokens;
  float* peaks;
};
void sample(const SampleBatch& batch);

/// Each row's most probable token (the first of equals) and its logit, as `sample` at temperature 0. Rows of vocab lie
/// one behind the other.
void argmax(const float* logits, int64_t rows, int64_t vocab, int64_t* tokens, float* peaks);

/// log softmax(logits / temperature) at the query's ids and of its `top` best, these by falling probability and then by
/// id.
void log_probabilities(const float* logits, int64_t vocab, const LogprobQuery& query);

/// -inf where the bit of a token is 0. bits: [ceil(vocab / 32)], token t is bit t % 32 of word t / 32.
void apply_bitmask(float* logits, int64_t vocab, const int32_t* bits);

struct Penalties {
  float frequency, presence, repetition;
};
/// For each of the n distinct ids with their counts: subtract frequency * count and presence (if count > 0), then
/// divide positive and multiply negative logits by repetition.
void penalise(float* logits, const int64_t* ids, const float* counts, int64_t n, const Penalties& penalties);

}  // namespace ml

ML_DECLARE_TABLE(SamplingOps, sampling)
