// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), many counters at a time: the random
// numbers of dropout, by the rule in kernels.h.
#pragma once
#include "common.h"

namespace mlite {
namespace MLITE_ISA {

constexpr int kCounters = kLanes / 2;  // of one step; each gives four words
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

// Words 0 to 3 of each of `counters` counters (number's halves, 0, 0), number from `first` on, in the order of the
// elements. Writes whole steps of 4 * kCounters words.
inline void philox(uint64_t seed, uint64_t first, int counters, uint32_t* words) {
  const Longs m_0 = Longs{} + 0xD2511F53u, m_1 = Longs{} + 0xCD9E8D57u;
  Longs number;
  for (int i = 0; i < kCounters; ++i) number[i] = first + i;
  for (int done = 0; done < counters; done += kCounters, number += kCounters, words += 4 * kCounters) {
    // Each word is the lower half of a lane; what gathers in the upper halves never counts.
    Longs w_0 = number, w_1 = number >> 32, w_2 = {}, w_3 = {};
    uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key_0 += 0x9E3779B9u, key_1 += 0xBB67AE85u) {
      const Longs a = multiply_low(w_0, m_0), b = multiply_low(w_2, m_1);
      w_0 = b >> 32 ^ w_1 ^ key_0;
      w_2 = a >> 32 ^ w_3 ^ key_1;
      w_1 = b;
      w_3 = a;
    }
    const Longs low = (w_0 & 0xffffffffu) | w_1 << 32, high = (w_2 & 0xffffffffu) | w_3 << 32;
#ifdef __AVX512F__
    const Longs near = {0, 8, 1, 9, 2, 10, 3, 11}, far = near + 4;
    store_raw(words, bit_cast<Words>(_mm512_permutex2var_epi64(bit_cast<__m512i>(low), bit_cast<__m512i>(near),
                                                               bit_cast<__m512i>(high))), kLanes);
    store_raw(words + kLanes, bit_cast<Words>(_mm512_permutex2var_epi64(
                                  bit_cast<__m512i>(low), bit_cast<__m512i>(far), bit_cast<__m512i>(high))), kLanes);
#else
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t pair[2] = {low[i], high[i]};
      memcpy(words + 4 * i, pair, sizeof(pair));
    }
#endif
  }
}

// Which of a tensor's elements are dropped.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // words below it drop
  float kept;          // factor of what stays

  Dropout(double p, uint64_t seed)
      // Where p is 1, what is kept is 0 too, so that the threshold, which has no room for 2^32, does not matter.
      : seed(seed),
        threshold(p >= 1.0 ? 0 : static_cast<uint32_t>(p * 4294967296.0)),
        kept(p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p))) {}
};

}  // namespace MLITE_ISA
}  // namespace mlite
