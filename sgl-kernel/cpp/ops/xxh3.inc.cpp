// XXH3-64 of long inputs, as its specification has it (github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): eight
// lanes take in stripes of 64 bytes with a part of the secret that moves on by 8 bytes from stripe to stripe; after 16
// stripes the lanes are scrambled. The last 64 bytes come once more or for the first time, with a secret of their own.
#include "ops/xxh3.h"

#include <cstring>

#ifdef ML_X86
#include <immintrin.h>
#endif

namespace ml::ML_ISA {
namespace {

constexpr uint64_t kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
                                  0x85EBCA77C2B2AE63ull, 0x27D4EB2F165667C5ull};
constexpr int kSecretBytes = 192, kStripesPerBlock = (kSecretBytes - int(kXxh3Stripe)) / 8;
constexpr int kLastSecret = kSecretBytes - int(kXxh3Stripe) - 7, kMergeSecret = 11;

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

uint64_t secret_word(int at) {
  uint64_t word;
  std::memcpy(&word, kSecret + at, 8);
  return word;
}

/// The eight lanes. `add` takes in a stripe, and copies it unless `to` is null; past the caches when it `streams`, which
/// saves reading what is overwritten and needs a `to` at a multiple of 64.
struct Lanes {
#if defined(ML_ISA_AVX512)
  __m512i lanes;

  explicit Lanes(const uint64_t* first) : lanes(_mm512_loadu_si512(first)) {}

  void add(const char* from, char* to, bool streams, int secret) {
    const __m512i data = _mm512_loadu_si512(from);
    if (streams) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), data);
    } else if (to != nullptr) {
      _mm512_storeu_si512(to, data);
    }
    const __m512i key = _mm512_xor_si512(data, _mm512_loadu_si512(kSecret + secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    lanes = _mm512_add_epi64(lanes, _mm512_add_epi64(product, _mm512_shuffle_epi32(data, _MM_PERM_ENUM(0x4e))));
  }

  void scramble() {
    const __m512i secret = _mm512_loadu_si512(kSecret + kSecretBytes - kXxh3Stripe);
    const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47)), secret);
    lanes = _mm512_mullo_epi64(mixed, _mm512_set1_epi64(int64_t(kPrime32[0])));
  }

  void store(uint64_t* out) const { _mm512_storeu_si512(out, lanes); }

  static void fence() { _mm_sfence(); }
#elif defined(ML_ISA_AVX2)
  __m256i lanes[2];

  explicit Lanes(const uint64_t* first) {
    for (int i = 0; i < 2; ++i) lanes[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first) + i);
  }

  void add(const char* from, char* to, bool streams, int secret) {
    for (int i = 0; i < 2; ++i) {
      const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
      if (streams) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, data);
      } else if (to != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, data);
      }
      const __m256i key =
          _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSecret + secret) + i));
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      lanes[i] = _mm256_add_epi64(lanes[i], _mm256_add_epi64(product, _mm256_shuffle_epi32(data, 0x4e)));
    }
  }

  void scramble() {
    const __m256i prime = _mm256_set1_epi64x(int64_t(kPrime32[0]));
    for (int i = 0; i < 2; ++i) {
      const auto* secret = reinterpret_cast<const __m256i*>(kSecret + kSecretBytes - kXxh3Stripe);
      const __m256i mixed =
          _mm256_xor_si256(_mm256_xor_si256(lanes[i], _mm256_srli_epi64(lanes[i], 47)), _mm256_loadu_si256(secret + i));
      const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime), 32);
      lanes[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), high);
    }
  }

  void store(uint64_t* out) const {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, lanes[i]);
  }

  static void fence() { _mm_sfence(); }
#else
  uint64_t lanes[8];

  explicit Lanes(const uint64_t* first) { std::memcpy(lanes, first, sizeof(lanes)); }

  void add(const char* from, char* to, bool, int secret) {
    uint64_t data[8];
    std::memcpy(data, from, sizeof(data));
    if (to != nullptr) std::memcpy(to, data, sizeof(data));
    for (int i = 0; i < 8; ++i) {
      const uint64_t key = data[i] ^ secret_word(secret + 8 * i);
      lanes[i] += data[i ^ 1] + uint64_t(uint32_t(key)) * (key >> 32);
    }
  }

  void scramble() {
    for (int i = 0; i < 8; ++i) {
      const uint64_t secret = secret_word(kSecretBytes - int(kXxh3Stripe) + 8 * i);
      lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ secret) * kPrime32[0];
    }
  }

  void store(uint64_t* out) const { std::memcpy(out, lanes, sizeof(lanes)); }

  static void fence() {}
#endif
};

uint64_t merged(const uint64_t* lanes, uint64_t bytes) {
  uint64_t hash = bytes * kPrime64[0];
  for (int i = 0; i < 4; ++i) {
    const uint64_t low = lanes[2 * i] ^ secret_word(kMergeSecret + 16 * i);
    const uint64_t high = lanes[2 * i + 1] ^ secret_word(kMergeSecret + 16 * i + 8);
    const unsigned __int128 product = (unsigned __int128)low * high;
    hash += uint64_t(product) ^ uint64_t(product >> 64);
  }
  hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9ull;
  return hash ^ (hash >> 32);
}

uint64_t sum(const SummedPart* parts, int64_t count) {
  const uint64_t first[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                             kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
  Lanes lanes(first);
  int64_t bytes = 0;
  int in_block = 0;
  for (int64_t p = 0; p < count; ++p) {
    const char* from = parts[p].from;
    char* to = parts[p].to;
    const bool streams = to != nullptr && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    bytes += parts[p].bytes;
    int64_t left = parts[p].bytes / kXxh3Stripe - (p + 1 == count);  // the very last stripe is not one of a block
    while (left > 0) {
      const int run = int(left < kStripesPerBlock - in_block ? left : kStripesPerBlock - in_block);
      for (int i = 0; i < run; ++i) {
        lanes.add(from, to, streams, 8 * (in_block + i));
        from += kXxh3Stripe;
        if (to != nullptr) to += kXxh3Stripe;
      }
      left -= run;
      in_block += run;
      if (in_block == kStripesPerBlock) {
        lanes.scramble();
        in_block = 0;
      }
    }
    if (p + 1 == count) lanes.add(from, to, streams, kLastSecret);
  }
  Lanes::fence();
  uint64_t last[8];
  lanes.store(last);
  return merged(last, uint64_t(bytes));
}

}  // namespace

const Xxh3Table xxh3_table = {sum};

}  // namespace ml::ML_ISA
