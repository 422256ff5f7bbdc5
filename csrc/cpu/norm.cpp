// LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), with the residual addition before them. A row is
// read from memory once and from the cache after that.
#include "common.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

template <typename T>
void forward_row(bool rms, int64_t cols, float eps, const T* x, const T* residual, const T* weight, const T* bias,
                 T* y, T* sum, float* mean_out, float* rstd_out) {
  Floats totals[kUnroll] = {};
  for_vectors(cols, [&](int64_t i, int count, int j) MLITE_INLINE {
    Floats v = load(x + i, count);
    if (residual) {
      store(sum + i, v + load(residual + i, count), count);
      v = load(sum + i, count);  // rounded
    }
    totals[j] += rms ? v * v : v;
  });
  const T* const in = residual ? sum : x;
  float mean = 0, square = sum_of(totals);
  if (!rms) {
    mean = square / cols;
    Floats squares[kUnroll] = {};
    for_vectors(cols, [&](int64_t i, int count, int j) MLITE_INLINE {
      const Floats v = first_of(load(in + i, count) - mean, count, 0);
      squares[j] += v * v;
    });
    square = sum_of(squares);
    *mean_out = mean;
  }
  const float rstd = 1.0f / std::sqrt(square / cols + eps);
  *rstd_out = rstd;
  for_vectors(cols, [&](int64_t i, int count, int) MLITE_INLINE {
    Floats out = (load(in + i, count) - mean) * rstd * load(weight + i, count);
    if (bias) out += load(bias + i, count);
    store(y + i, out, count);
  });
}

// partial: this block's sums for the weight, then (kBias) those for the bias.
template <bool kBias, typename T>
void backward_row(int64_t cols, const T* dy, const T* dsum, const T* x, const T* weight, float mean, float rstd,
                  bool rms, T* dx, float* partial) {
  Floats offsets[kUnroll] = {}, slopes[kUnroll] = {};  // sums of g and of g * normed, where g = dy * weight
  for_vectors(cols, [&](int64_t i, int count, int j) MLITE_INLINE {
    const Floats g = load(dy + i, count) * load(weight + i, count);
    offsets[j] += g;
    slopes[j] += g * ((load(x + i, count) - mean) * rstd);
  });
  const float offset = rms ? 0.0f : sum_of(offsets) / cols, slope = sum_of(slopes) / cols;
  for_vectors(cols, [&](int64_t i, int count, int) MLITE_INLINE {
    const Floats d = load(dy + i, count), normed = (load(x + i, count) - mean) * rstd;
    Floats out = (d * load(weight + i, count) - offset - normed * slope) * rstd;
    if (dsum) out += load(dsum + i, count);
    store(dx + i, out, count);
    store(partial + i, load(partial + i, count) + d * normed, count);
    if (kBias) store(partial + cols + i, load(partial + cols + i, count) + d, count);
  });
}

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(norm_forward)(int dtype, bool rms, int64_t rows, int64_t cols, float eps, const void* x,
                            const void* residual, const void* weight, const void* bias, void* y, void* sum, float* mean,
                            float* rstd) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, cols, [&](int64_t row) {
      forward_row(rms, cols, eps, static_cast<const T*>(x) + row * cols,
                  residual ? static_cast<const T*>(residual) + row * cols : nullptr, static_cast<const T*>(weight),
                  static_cast<const T*>(bias), static_cast<T*>(y) + row * cols,
                  residual ? static_cast<T*>(sum) + row * cols : nullptr, rms ? nullptr : mean + row, rstd + row);
    });
  });
}

int MLITE_CPU(norm_backward)(int dtype, bool rms, int64_t rows, int64_t cols, const void* dy, const void* dsum,
                             const void* x, const void* weight, const float* mean, const float* rstd, void* dx,
                             float* dweight, float* dbias, float* workspace, int64_t workspace_rows) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = dbias ? backward_row<true, T> : backward_row<false, T>;
    sum_over_rows(rows, dbias ? 2 * cols : cols, cols, workspace, workspace_rows, dweight, dbias,
                  [&](float* partial, int64_t row) {
                    run(cols, static_cast<const T*>(dy) + row * cols,
                        dsum ? static_cast<const T*>(dsum) + row * cols : nullptr,
                        static_cast<const T*>(x) + row * cols, static_cast<const T*>(weight), rms ? 0.0f : mean[row],
                        rstd[row], rms, static_cast<T*>(dx) + row * cols, partial);
                  });
  });
}
