// Cross entropy over a slice of the vocabulary, its gradient in place of the logits.
//
// Statistics: one read from memory, by chunks that stay in the cache between their maximum and their sum, which is
// rescaled when a later chunk has a larger one (Milakov and Gimelshein 2018, arXiv:1805.02867).
#include "common.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // columns

template <typename T>
void stats_row(int64_t valid, const T* x, float* max_out, float* sum_out) {
  float max = -INFINITY, sum = 0;
  for (int64_t start = 0; start < valid; start += kChunk) {
    const T* const in = x + start;
    const int64_t size = valid - start < kChunk ? valid - start : kChunk;
    Floats maxima[kUnroll], sums[kUnroll] = {};
    for (Floats& part : maxima) part = splat(max);
    for_vectors(size, [&](int64_t i, int count, int j) MLITE_INLINE {
      maxima[j] = largest_of(maxima[j], first_of(load(in + i, count), count, -INFINITY));
    });
    const float larger = max_of(maxima);
    if (larger > max) sum *= exp(splat(max - larger))[0];
    max = larger;
    const float base = max == -INFINITY ? 0.0f : max;  // exp(-inf) is 0, where -inf - -inf would be NaN
    for_vectors(size, [&](int64_t i, int count, int j) MLITE_INLINE {
      sums[j] += first_of(exp(load(in + i, count) - base), count, 0);
    });
    sum += sum_of(sums);
  }
  *max_out = max;
  *sum_out = sum;
}

template <typename T>
void grad_row(int64_t cols, int64_t valid, int64_t label, T* x, float max, float sum, float grad, float z_loss) {
  const float factor = grad * (1.0f + 2.0f * z_loss * (max + std::log(sum))) / sum;
  const bool here = label >= 0 && label < valid;
  const float label_logit = here ? to_float(x[label]) : 0.0f;
  for_vectors(valid, [&](int64_t i, int count, int) MLITE_INLINE {
    store(x + i, exp(load(x + i, count) - max) * factor, count);
  });
  if (here) store(x + label, exp(splat(label_logit - max)) * factor - grad, 1);
  memset(x + valid, 0, sizeof(T) * (cols - valid));
}

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(cross_entropy_stats)(int dtype, int64_t rows, int64_t cols, int64_t valid, int64_t start,
                                   const void* logits, const int64_t* labels, float* max, float* sum,
                                   float* label_logit) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, cols, [&](int64_t row) {
      const T* const x = static_cast<const T*>(logits) + row * cols;
      stats_row(valid, x, max + row, sum + row);
      const int64_t label = labels[row] - start;
      label_logit[row] = label >= 0 && label < valid ? to_float(x[label]) : 0.0f;
    });
  });
}

int MLITE_CPU(cross_entropy_grad)(int dtype, int64_t rows, int64_t cols, int64_t valid, int64_t start, void* logits,
                                  const int64_t* labels, const float* max, const float* sum, const float* grad,
                                  float z_loss) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, cols, [&](int64_t row) {
      grad_row(cols, valid, labels[row] - start, static_cast<T*>(logits) + row * cols, max[row], sum[row], grad[row],
               z_loss);
    });
  });
}
