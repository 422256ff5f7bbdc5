// Scaled softmax over the keys that a query may see: causal, by a mask, within a document, or any of these together.
// Keys beyond the causal limit are not read at all.
#include "common.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

// Which keys one query may see.
struct Visible {
  const uint8_t* mask;
  int64_t mask_stride;
  const int32_t* segments;
  int32_t segment;

  MLITE_INLINE Ints operator()(int64_t key, int count) const {
    Ints seen = lanes_below(count);
    if (mask && mask_stride == 1) {
      seen &= __builtin_convertvector(load_raw<Bytes>(mask + key, count), Ints) != 0;
    } else if (mask) {
      for (int i = 0; i < count; ++i)
        if (!mask[(key + i) * mask_stride]) seen[i] = 0;
    }
    if (segments) seen &= load_raw<Ints>(segments + key, count) == segment;
    return seen;
  }
};

constexpr int64_t kBuffer = 4096;  // keys whose exponentials are kept in fp32; beyond, they are computed twice

template <typename T>
void forward_row(int64_t limit, int64_t keys, float scale, const T* x, const Visible& visible, T* y) {
  Floats maxima[kUnroll], sums[kUnroll] = {};
  for (Floats& max : maxima) max = splat(-INFINITY);
  for_vectors(limit, [&](int64_t i, int count, int j) MLITE_INLINE {
    const Floats score = load(x + i, count) * scale;
    maxima[j] = largest_of(maxima[j], visible(i, count) ? score : splat(-INFINITY));
  });
  const float max = max_of(maxima);
  const auto exponential = [&](int64_t i, int count) MLITE_INLINE {
    return visible(i, count) ? exp(load(x + i, count) * scale - max) : splat(0);
  };
  float own[std::is_same_v<T, float> ? 1 : kBuffer];
  float* kept = own;
  if constexpr (std::is_same_v<T, float>) kept = y;
  const bool keep = std::is_same_v<T, float> || limit <= kBuffer;
  for_vectors(limit, [&](int64_t i, int count, int j) MLITE_INLINE {
    const Floats e = exponential(i, count);
    sums[j] += e;
    if (keep) store(kept + i, e, count);
  });
  const float inverse = 1.0f / sum_of(sums);  // inf where no key counts; else the largest alone makes the sum 1
  for_vectors(limit, [&](int64_t i, int count, int) MLITE_INLINE {
    const Floats e = keep ? load(kept + i, count) : exponential(i, count);
    store(y + i, visible(i, count) ? e * inverse : splat(0), count);
  });
  memset(y + limit, 0, sizeof(T) * (keys - limit));
}

template <typename T>
void backward_row(int64_t keys, float scale, const T* dy, const T* y, T* dx) {
  Floats sums[kUnroll] = {};
  for_vectors(keys, [&](int64_t i, int count, int j) MLITE_INLINE {
    sums[j] += load(dy + i, count) * load(y + i, count);
  });
  const float dot = sum_of(sums);
  for_vectors(keys, [&](int64_t i, int count, int) MLITE_INLINE {
    store(dx + i, scale * load(y + i, count) * (load(dy + i, count) - dot), count);
  });
}

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(softmax_forward)(int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, float scale,
                               const void* x, const uint8_t* mask, int64_t mask_stride_b, int64_t mask_stride_h,
                               int64_t mask_stride_q, int64_t mask_stride_k, const int32_t* segments_q,
                               const int32_t* segments_k, bool causal, void* y) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(batch * heads * queries, keys, [&](int64_t row) {
      const int64_t query = row % queries, head = row / queries % heads, b = row / queries / heads;
      const int64_t causal_limit = query + keys - queries + 1;  // keys before it
      const int64_t limit = !causal ? keys : causal_limit < 0 ? 0 : causal_limit;
      const Visible visible{
          mask ? mask + b * mask_stride_b + head * mask_stride_h + query * mask_stride_q : nullptr, mask_stride_k,
          segments_k ? segments_k + b * keys : nullptr, segments_k ? segments_q[b * queries + query] : 0};
      forward_row(limit, keys, scale, static_cast<const T*>(x) + row * keys, visible, static_cast<T*>(y) + row * keys);
    });
  });
}

int MLITE_CPU(softmax_backward)(int dtype, int64_t rows, int64_t keys, float scale, const void* dy, const void* y,
                                void* dx) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, keys, [&](int64_t row) {
      backward_row(keys, scale, static_cast<const T*>(dy) + row * keys, static_cast<const T*>(y) + row * keys,
                   static_cast<T*>(dx) + row * keys);
    });
  });
}
