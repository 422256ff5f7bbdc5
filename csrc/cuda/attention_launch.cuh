// Host side of the attention kernels: checks of the arguments.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "../include/attention.h"
#include "attention_dropout.cuh"

namespace mlite {

// The cudaError_t of these names.
constexpr int kInvalidValue = 1, kMisalignedAddress = 716, kNotSupported = 801;

inline Tensor tensor(const void* data, const int64_t* strides) {
  return {const_cast<void*>(data), strides[0], strides[1], strides[2]};
}

// Sizes as they came, before they become int.
struct Sizes {
  int64_t batch, heads, groups, queries, keys, head_dim;
};

struct Dropout {
  double p;
  uint64_t seed;
  int64_t head, heads;
};

inline int check(int dtype, const Sizes& s, float scale, const void* segments_q, const void* segments_k,
                 const Dropout& dropout, std::initializer_list<Tensor> tensors) {
  constexpr int64_t most = 1 << 30;  // so that a position, and a sum of two, is an int
  if (dtype == MLITE_F32) return kNotSupported;
  if (dtype != MLITE_BF16 && dtype != MLITE_F16) return kInvalidValue;
  if (s.batch < 0 || s.heads < 0 || s.queries < 0 || s.keys < 0 || s.queries > most || s.keys > most)
    return kInvalidValue;
  if (s.groups < 1 || s.heads % s.groups != 0 || s.heads > 65535 || s.batch > 65535) return kInvalidValue;
  if (s.head_dim < 8 || s.head_dim > 256 || s.head_dim % 8 != 0 || !(scale > 0)) return kInvalidValue;
  if ((segments_q == nullptr) != (segments_k == nullptr)) return kInvalidValue;
  if (!(dropout.p >= 0 && dropout.p <= 1)) return kInvalidValue;
  if (dropout.p > 0 && (dropout.head < 0 || dropout.head > dropout.heads - s.heads)) return kInvalidValue;
  for (const Tensor& t : tensors) {
    const auto address = reinterpret_cast<uintptr_t>(t.data);
    if (address % 16 != 0 || t.batch % 8 != 0 || t.head % 8 != 0 || t.sequence % 8 != 0)
      return kMisalignedAddress;
  }
  return 0;
}

inline Attention attention(const Sizes& s, float scale, bool causal, const int32_t* segments_q,
                           const int32_t* segments_k, const Dropout& dropout) {
  const uint64_t threshold = dropout_threshold(dropout.p);
  return {int(s.heads), int(s.groups), int(s.queries), int(s.keys), int(s.head_dim), causal, scale, segments_q,
          segments_k, threshold > 0, uint32_t(threshold - 1), dropout.seed, dropout.head, dropout.heads,
          threshold > 0 ? dropout_factor(dropout.p) : 1.0f};
}

}  // namespace mlite
