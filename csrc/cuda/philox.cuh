// Random numbers of dropout: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
#pragma once
#include "common.cuh"

namespace mlite {

// Words 0 to 3 for the counter (number's halves, 0, 0).
__device__ __forceinline__ void philox(uint64_t seed, uint64_t number, uint32_t (&words)[4]) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  words[0] = static_cast<uint32_t>(number);
  words[1] = static_cast<uint32_t>(number >> 32);
  words[2] = words[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * words[0], b = uint64_t(0xCD9E8D57u) * words[2];
    words[0] = static_cast<uint32_t>(b >> 32) ^ words[1] ^ key_0;
    words[2] = static_cast<uint32_t>(a >> 32) ^ words[3] ^ key_1;
    words[1] = static_cast<uint32_t>(b);
    words[3] = static_cast<uint32_t>(a);
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
}

// Word index % 4, without a run-time index into `words`, which would put them in memory.
__device__ __forceinline__ uint32_t philox_word(const uint32_t (&words)[4], uint64_t index) {
  return index % 4 < 2 ? (index % 2 ? words[1] : words[0]) : (index % 2 ? words[3] : words[2]);
}

// Words below this mean "dropped".
inline uint64_t dropout_threshold(double p) {
  return p >= 1.0 ? uint64_t(1) << 32 : static_cast<uint64_t>(p * 4294967296.0);
}

// By what is multiplied what stays.
inline float dropout_factor(double p) { return p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p)); }

}  // namespace mlite
