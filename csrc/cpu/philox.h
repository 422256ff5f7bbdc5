// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), many counters at a time: the
// random numbers of dropout, by the rule in kernels.h.
#pragma once
#include "common.h"

namespace mlite {
namespace MLITE_ISA {

constexpr int kCounters = kLanes / 2;  // that one vector holds; each gives four words
constexpr int kStreams = 4;            // vectors at a time, so that none waits for its products
constexpr int kRounds = 10;
typedef uint64_t Longs __attribute__((vector_size(8 * kCounters)));

// Products of the lower halves of 64-bit numbers.
MLITE_INLINE inline Longs multiply_low(Longs a, Longs b) {
#if defined(__AVX512F__)
  return bit_cast<Longs>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Longs>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Words of kCounters counters in the order of the elements; word i in the lower halves of the lanes of w[i].
MLITE_INLINE inline void store_words(uint32_t* out, const Longs (&w)[4]) {
#ifdef __AVX512F__
  const Longs near = {0, 8, 1, 9, 2, 10, 3, 11}, far = near + 4;
  __m512i half[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i above = _mm512_maskz_slli_epi64(0xff, bit_cast<__m512i>(w[2 * i + 1]), 32);
    half[i] = _mm512_mask_blend_epi32(0xaaaa, bit_cast<__m512i>(w[2 * i]), above);
  }
  store_raw(out, bit_cast<Words>(_mm512_permutex2var_epi64(half[0], bit_cast<__m512i>(near), half[1])), kLanes);
  store_raw(out + kLanes, bit_cast<Words>(_mm512_permutex2var_epi64(half[0], bit_cast<__m512i>(far), half[1])), kLanes);
#else
  for (int i = 0; i < kCounters; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = static_cast<uint32_t>(w[j][i]);
#endif
}

struct Philox {
  uint64_t keys[kRounds][2];

  explicit Philox(uint64_t seed) {
    uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
    for (auto& key : keys) {
      key[0] = key_0, key[1] = key_1;
      key_0 += 0x9E3779B9u, key_1 += 0xBB67AE85u;
    }
  }

  // The words of kCounters counters (number's halves, 0, 0) from first[i] on, to out[i].
  void draw(const uint64_t (&first)[kStreams], uint32_t* const (&out)[kStreams]) const {
    const Longs factor_0 = Longs{} + 0xD2511F53u, factor_1 = Longs{} + 0xCD9E8D57u;
    Longs w[kStreams][4], lane;
    for (int i = 0; i < kCounters; ++i) lane[i] = i;
    for (int i = 0; i < kStreams; ++i) {
      // Each word is the lower half of a lane; what gathers in the upper halves never counts.
      w[i][0] = lane + first[i], w[i][1] = w[i][0] >> 32;
      w[i][2] = w[i][3] = Longs{};
    }
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kStreams; ++i) {
        const Longs a = multiply_low(w[i][0], factor_0), b = multiply_low(w[i][2], factor_1);
        w[i][0] = b >> 32 ^ w[i][1] ^ keys[round][0];
        w[i][2] = a >> 32 ^ w[i][3] ^ keys[round][1];
        w[i][1] = b, w[i][3] = a;
      }
    }
    for (int i = 0; i < kStreams; ++i) store_words(out[i], w[i]);
  }
};

// Which of a tensor's elements are dropped.
struct Dropout {
  Philox random;
  uint32_t threshold;  // words below it drop
  float kept;          // factor of what stays

  Dropout(double p, uint64_t seed)
      // Where p is 1, what is kept is 0 too, so that the threshold, which has no room for 2^32, does not matter.
      : random(seed),
        threshold(p >= 1.0 ? 0 : static_cast<uint32_t>(p * 4294967296.0)),
        kept(p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p))) {}
};

}  // namespace MLITE_ISA
}  // namespace mlite
