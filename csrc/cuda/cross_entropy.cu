// Cross entropy over a slice of the vocabulary, its gradient in place of the logits.
//
// Statistics: one read, the running maximum and the sum relative to it together (Milakov and Gimelshein 2018,
// arXiv:1805.02867). Gradient: one read and one write. Between the two the caller combines the slices.
// Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "rows.cuh"

namespace mlite {
namespace {

constexpr int kInFlight = 4;  // vectors

// (max, sum of exp(x - max)) of two sets of numbers; a set without numbers is (-inf, 0).
struct Combine {
  __device__ __forceinline__ void operator()(float (&mine)[2], const float (&other)[2]) const {
    const float largest = fmaxf(mine[0], other[0]);
    // Not exp(0) where equal: -inf - -inf would be NaN.
    const float mine_factor = mine[0] == largest ? 1.0f : expf(mine[0] - largest);
    const float other_factor = other[0] == largest ? 1.0f : expf(other[0] - largest);
    mine[1] = mine[1] * mine_factor + other[1] * other_factor;
    mine[0] = largest;
  }
};

// Columns from `col` on, with -inf in the place of those that are no tokens.
template <typename T, int kVector>
__device__ __forceinline__ Vector<T, kVector> load_valid(const T* x, int col, int valid) {
  Vector<T, kVector> result;
  if (col < valid) result = load<kVector>(x + col);
  if (col + kVector <= valid) return result;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (col + i >= valid) result.set(i, -INFINITY);
  return result;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kMaxGroup)
    cross_entropy_stats_kernel(int64_t rows, int cols, int valid, int64_t start, const T* logits,
                               const int64_t* labels, float* max_out, float* sum_out, float* label_out) {
  using V = Vector<T, kVector>;
  int phase = 0;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const T* const x = logits + row * cols;
    float total[2] = {-INFINITY, 0};
    for (int from = threadIdx.x * kVector; from < valid; from += kInFlight * blockDim.x * kVector) {
      V in[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) in[j] = load_valid<T, kVector>(x, from + j * blockDim.x * kVector, valid);
      float largest = total[0];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
#pragma unroll
        for (int i = 0; i < kVector; ++i) largest = fmaxf(largest, in[j][i]);
      if (largest > total[0]) total[1] *= expf(total[0] - largest);
      total[0] = largest;
      const float base = largest == -INFINITY ? 0.0f : largest;  // exp(-inf) is 0, where -inf - -inf would be NaN
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
#pragma unroll
        for (int i = 0; i < kVector; ++i) total[1] += exp_for<T>(in[j][i] - base);
    }
    group_reduce(total, phase, Combine());
    if (threadIdx.x != 0) continue;
    const int64_t label = labels[row] - start;
    max_out[row] = total[0];
    sum_out[row] = total[1];
    label_out[row] = label >= 0 && label < valid ? to_float(x[label]) : 0.0f;
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kMaxGroup)
    cross_entropy_grad_kernel(int64_t rows, int cols, int valid, int64_t start, T* logits, const int64_t* labels,
                              const float* max_in, const float* sum_in, const float* grad_in, float z_loss) {
  using V = Vector<T, kVector>;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    T* const x = logits + row * cols;
    const float largest = max_in[row], grad = grad_in[row];
    const float factor = grad * (1.0f + 2.0f * z_loss * (largest + logf(sum_in[row]))) / sum_in[row];
    const int64_t label = labels[row] - start;
    for (int from = threadIdx.x * kVector; from < cols; from += kInFlight * blockDim.x * kVector) {
      V in[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) in[j] = load_valid<T, kVector>(x, from + j * blockDim.x * kVector, valid);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int col = from + j * blockDim.x * kVector;
        if (col >= cols) continue;
        V out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) out.set(i, exp_for<T>(in[j][i] - largest) * factor);
        // Few vectors hold the label or padding: they alone look at each column.
        if (label >= col && label < col + kVector)
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            if (col + i == label) out.set(i, exp_for<T>(in[j][i] - largest) * factor - grad);
        if (col + kVector > valid)
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            if (col + i >= valid) out.set(i, 0.0f);
        store(x + col, out);
      }
    }
  }
}

template <typename T, int kVector>
int stats(int64_t rows, int64_t cols, int64_t valid, int64_t start, const void* logits, const int64_t* labels,
          float* max, float* sum, float* label_logit, void* stream) {
  const RowShape shape = row_shape(rows, divide_up(cols, kVector), kInFlight, rows);
  return launch(cross_entropy_stats_kernel<T, kVector>, shape.grid, shape.block, 0, stream, rows,
                static_cast<int>(cols), static_cast<int>(valid), start, static_cast<const T*>(logits), labels, max,
                sum, label_logit);
}

template <typename T, int kVector>
int gradient(int64_t rows, int64_t cols, int64_t valid, int64_t start, void* logits, const int64_t* labels,
             const float* max, const float* sum, const float* grad, float z_loss, void* stream) {
  const RowShape shape = row_shape(rows, divide_up(cols, kVector), kInFlight, rows);
  return launch(cross_entropy_grad_kernel<T, kVector>, shape.grid, shape.block, 0, stream, rows,
                static_cast<int>(cols), static_cast<int>(valid), start, static_cast<T*>(logits), labels, max, sum,
                grad, z_loss);
}

}  // namespace
}  // namespace mlite

using namespace mlite;

int mlite_cuda_cross_entropy_stats(int dtype, int64_t rows, int64_t cols, int64_t valid, int64_t start,
                                   const void* logits, const int64_t* labels, float* max, float* sum,
                                   float* label_logit, void* stream) {
  if (rows == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const auto run = cols % kVector == 0 && aligned(logits) ? stats<T, kVector> : stats<T, 1>;
    return run(rows, cols, valid, start, logits, labels, max, sum, label_logit, stream);
  });
}

int mlite_cuda_cross_entropy_grad(int dtype, int64_t rows, int64_t cols, int64_t valid, int64_t start, void* logits,
                                  const int64_t* labels, const float* max, const float* sum, const float* grad,
                                  float z_loss, void* stream) {
  if (rows == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const auto run = cols % kVector == 0 && aligned(logits) ? gradient<T, kVector> : gradient<T, 1>;
    return run(rows, cols, valid, start, logits, labels, max, sum, grad, z_loss, stream);
  });
}
