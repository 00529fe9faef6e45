#include "ops/limits.h"

#include "simd/vec.h"

namespace ml::ML_ISA {
namespace {

constexpr int kSums = 12;  // enough independent chains to hide the latency of the multiply-add

uint64_t read(const void* data, int64_t n) {
  using Words = uint64_t __attribute__((vector_size(64), aligned(8)));
  Words sum[4] = {};
  const char* p = static_cast<const char*>(data);
  for (int64_t i = 0; i + 256 <= n; i += 256) {
    __builtin_prefetch(p + i + 4096);
    __builtin_prefetch(p + i + 4096 + 64);
    __builtin_prefetch(p + i + 4096 + 128);
    __builtin_prefetch(p + i + 4096 + 192);
    for (int k = 0; k < 4; ++k) sum[k] ^= *reinterpret_cast<const Words*>(p + i + 64 * k);
  }
  const Words all = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
  uint64_t result = 0;
  for (int k = 0; k < 8; ++k) result ^= all[k];
  return result;
}

float fma_f32(int64_t rounds, int64_t* operations) {
  f32v sums[kSums];
  for (int k = 0; k < kSums; ++k) sums[k] = f32v::set(float(k));
  f32v a = f32v::set(1e-9f), b = f32v::set(0.5f);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+m"(a), "+m"(b));  // keeps the loop from being computed once for all
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) sums[k] = fma(sums[k], b, a);
  }
  f32v total = f32v::zero();
  for (int k = 0; k < kSums; ++k) total = total + sums[k];
  *operations = rounds * kSums * f32v::N * 2;
  return sum(total);
}

#if defined(ML_ISA_AVX512)
float dot_bf16(int64_t rounds, int64_t* operations) {
  f32v sums[kSums];
  for (int k = 0; k < kSums; ++k) sums[k] = f32v::set(float(k));
  __m512i a = _mm512_set1_epi16(0x3c00), b = _mm512_set1_epi16(0x3c01);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) sums[k].v = _mm512_dpbf16_ps(sums[k].v, (__m512bh)a, (__m512bh)b);
  }
  f32v total = f32v::zero();
  for (int k = 0; k < kSums; ++k) total = total + sums[k];
  *operations = rounds * kSums * f32v::N * 4;
  return sum(total);
}
#else
float dot_bf16(int64_t rounds, int64_t* operations) { return fma_f32(rounds, operations); }
#endif

}  // namespace

const LimitsTable limits_table = {read, fma_f32, dot_bf16};

}  // namespace ml::ML_ISA
