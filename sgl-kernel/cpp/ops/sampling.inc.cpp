#include "ops/sampling.h"

#include <cmath>

#include "base/span.h"
#include "ops/select.h"
#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

constexpr int64_t kLanes = f32v::N;
constexpr int64_t kBlock = 128;  // tokens that share a maximum and a sum

/// One row's working memory. values, keys, ids and work hold whole blocks.
struct Workspace {
  float* values;
  uint32_t* keys;  // of the candidates, with their token ids, in the order of the ids
  int32_t* ids;
  uint32_t* work;
  float* peaks;  // per block
  float* sums;
  Histogram* histogram;
  int64_t blocks;

  Workspace(void* memory, int64_t vocab) : blocks(ceil_div(vocab, kBlock)) {
    const int64_t padded = blocks * kBlock;
    histogram = static_cast<Histogram*>(memory);
    values = reinterpret_cast<float*>(histogram + 1);
    keys = reinterpret_cast<uint32_t*>(values + padded);
    ids = reinterpret_cast<int32_t*>(keys + padded);
    work = reinterpret_cast<uint32_t*>(ids + padded);
    peaks = reinterpret_cast<float*>(work + padded);
    sums = peaks + round_up(blocks, 16);
  }

  static int64_t bytes(int64_t vocab) {
    const int64_t blocks = ceil_div(vocab, kBlock);
    return int64_t(sizeof(Histogram)) + 4 * (4 * blocks * kBlock + 2 * round_up(blocks, 16));
  }
};

/// body(block, logits of the block) for whole blocks; the last one is copied and padded with -inf.
template <class Body>
ML_INLINE void each_block(const float* logits, int64_t vocab, Body body) {
  const int64_t whole = vocab / kBlock;
  for (int64_t block = 0; block < whole; ++block) body(block, logits + block * kBlock);
  if (whole * kBlock == vocab) return;
  float padded[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    padded[i] = whole * kBlock + i < vocab ? logits[whole * kBlock + i] : -__builtin_inff();
  }
  body(whole, static_cast<const float*>(padded));
}

/// values = f(logit), peaks and sums of g(value) by block. Returns the sum of the sums.
template <class F, class G>
ML_INLINE double map_blocks(const float* logits, int64_t vocab, Workspace& space, F f, G g) {
  double total = 0.0;
  each_block(logits, vocab, [&](int64_t block, const float* from) {
    float* to = space.values + block * kBlock;
    f32v peak = f32v::set(-__builtin_inff()), mass = f32v::zero();
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const f32v value = f(f32v::load(from + i));
      value.store(to + i);
      peak = max(value, peak);
      mass = mass + g(value);
    }
    space.peaks[block] = max(peak);
    space.sums[block] = sum(mass);
    total += double(space.sums[block]);
  });
  return total;
}

/// The candidates: tokens below vocab with values >= floor. Returns how many.
int64_t gather(Workspace& space, int64_t vocab, float floor) {
  int64_t n = 0;
  for (int64_t block = 0; block < space.blocks; ++block) {
    if (!(space.peaks[block] >= floor)) continue;
    const int64_t end = (block + 1) * kBlock < vocab ? (block + 1) * kBlock : vocab;
    for (int64_t t = block * kBlock; t < end; ++t) {
      space.keys[n] = ordered(space.values[t]);
      space.ids[n] = int32_t(t);
      n += space.values[t] >= floor;
    }
  }
  return n;
}

/// The first of n weights, given by index, whose cumulative sum exceeds `target`, but none behind the last positive
/// one.
template <class Weight>
ML_INLINE int64_t invert(int64_t n, double target, double& reached, Weight weight) {
  int64_t last = 0;
  double sum = 0.0, at_last = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = double(weight(i));
    if (!(w > 0.0)) continue;
    last = i;
    at_last = sum;
    sum += w;
    if (sum > target) break;
  }
  reached = at_last;
  return last;
}

int64_t draw_unfiltered(const Workspace& space, double total, double uniform) {
  double before, inside;
  const double target = uniform * total;
  const int64_t block = invert(space.blocks, target, before, [&](int64_t i) { return space.sums[i]; });
  const float* values = space.values + block * kBlock;
  return block * kBlock + invert(kBlock, target - before, inside, [&](int64_t i) { return values[i]; });
}

/// What top_k, top_p and min_p keep is among the tokens that reach this weight.
float weight_floor(const SampleParams& params, int64_t vocab, const Workspace& space, double total) {
  float floor = params.min_p > 1e-38f ? params.min_p : 1e-38f;  // weights are 0 or normal numbers
  if (params.top_k > 0 && params.top_k <= space.blocks) {
    const float bound = reached_by(space.peaks, space.blocks, params.top_k, *space.histogram);
    floor = bound > floor ? bound : floor;
  }
  if (params.top_p < 1.0) {
    // Tokens below this share hold less than 1 - top_p together. A little less, for the rounding to float.
    const float share = float(0.9999 * total * (1.0 - params.top_p) / double(vocab));
    floor = share > floor ? share : floor;
  }
  return floor;
}

int64_t draw(const float* logits, int64_t vocab, float peak, const SampleParams& params, void* workspace) {
  Workspace space(workspace, vocab);
  const f32v top = f32v::set(peak), temperature = f32v::set(params.temperature);
  const double total =
      map_blocks(logits, vocab, space, [&](f32v v) { return exp((v - top) / temperature); }, [](f32v v) { return v; });
  const bool by_rank = params.top_k > 0 && params.top_k < vocab, by_mass = params.top_p < 1.0;
  if (!by_rank && !by_mass && !(params.min_p > 0.0f)) return draw_unfiltered(space, total, params.uniform);

  const int64_t n = gather(space, vocab, weight_floor(params, vocab, space, total));
  Cut cut = {0, 0};
  if (by_rank || by_mass) {
    const int64_t most = by_rank ? params.top_k : vocab;
    const double limit = by_mass ? params.top_p * total : __builtin_inf();
    cut = by_mass ? find_cut<true>(space.keys, n, most, limit, space.work, *space.histogram)
                  : find_cut<false>(space.keys, n, most, limit, space.work, *space.histogram);
  }
  double mass = 0.0, reached;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = space.keys[i];
    if (key < cut.key || (key == cut.key && cut.ties-- <= 0)) continue;
    space.keys[kept] = key;
    space.ids[kept++] = space.ids[i];
    mass += double(unordered(key));
  }
  const int64_t chosen =
      invert(kept, params.uniform * mass, reached, [&](int64_t i) { return unordered(space.keys[i]); });
  return space.ids[chosen];
}

void log_probabilities(const float* logits, int64_t vocab, const LogprobQuery& query, void* workspace) {
  Workspace space(workspace, vocab);
  const f32v temperature = f32v::set(query.temperature);
  float peak = -__builtin_inff();
  each_block(logits, vocab, [&](int64_t, const float* from) {
    f32v best = f32v::load(from);
    for (int64_t i = kLanes; i < kBlock; i += kLanes) best = max(f32v::load(from + i), best);
    const float here = max(best);
    peak = here > peak ? here : peak;
  });
  const f32v top = f32v::set(peak / query.temperature);
  const double total =
      map_blocks(logits, vocab, space, [&](f32v v) { return v / temperature - top; }, [](f32v v) { return exp(v); });
  const float norm = float(std::log(total));
  for (int64_t i = 0; i < query.id_count; ++i) query.id_values[i] = space.values[query.ids[i]] - norm;
  if (query.top == 0) return;

  float floor = -__builtin_inff();
  if (query.top <= space.blocks) {
    floor = reached_by(space.peaks, space.blocks, query.top, *space.histogram);
    floor -= 1e-6f * (std::fabs(floor) + std::fabs(norm));  // rounding may make equals of neighbours
  }
  const int64_t n = gather(space, vocab, floor);
  for (int64_t i = 0; i < n; ++i) space.keys[i] = ordered(space.values[space.ids[i]] - norm);
  Cut cut = find_cut<false>(space.keys, n, query.top, __builtin_inf(), space.work, *space.histogram);
  int64_t kept = 0;
  for (int64_t i = 0; i < n && kept < query.top; ++i) {
    const uint32_t key = space.keys[i];
    if (key < cut.key || (key == cut.key && cut.ties-- <= 0)) continue;
    query.top_values[kept] = unordered(key);
    query.top_ids[kept++] = space.ids[i];
  }
  for (; kept < query.top; ++kept) {  // logits that are not numbers
    query.top_values[kept] = __builtin_nanf("");
    query.top_ids[kept] = 0;
  }
}

int64_t argmax(const float* logits, int64_t vocab, float* peak) {
  float best = -__builtin_inff();
  int64_t best_block = 0;
  f32v odd = f32v::zero();  // keeps a NaN it has met
  each_block(logits, vocab, [&](int64_t block, const float* from) {
    f32v largest = f32v::load(from);
    odd = select_unordered(largest, odd);
    for (int64_t i = kLanes; i < kBlock; i += kLanes) {
      const f32v v = f32v::load(from + i);
      odd = select_unordered(v, odd);
      largest = max(v, largest);
    }
    const float here = max(largest);
    if (here > best) {
      best = here;
      best_block = block;
    }
  });
  const bool broken = sum(odd) != 0.0f;  // a NaN is unequal to everything
  *peak = broken ? __builtin_nanf("") : best;
  int64_t at = best_block * kBlock;
  while (at + 1 < vocab && logits[at] != best) ++at;
  return at;
}

}  // namespace

const SamplingOps sampling_table = {argmax, Workspace::bytes, draw, log_probabilities};

}  // namespace ml::ML_ISA
