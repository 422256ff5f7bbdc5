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

template <typename T, int kVector>
__global__ void __launch_bounds__(kMaxGroup)
    cross_entropy_stats_kernel(int64_t rows, int64_t cols, int valid, int64_t start, const T* logits,
                               const int64_t* labels, float* max_out, float* sum_out, float* label_out) {
  using V = Vector<T, kVector>;
  int phase = 0;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.x) * blockDim.y) {
    const T* const x = logits + row * cols;
    float total[2] = {-INFINITY, 0};
    for (int from = threadIdx.x * kVector; from < valid; from += kInFlight * blockDim.x * kVector) {
      V in[kInFlight];
      float largest = total[0];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int col = from + j * blockDim.x * kVector;
        if (col < valid) in[j] = load<kVector>(x + col);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int col = from + j * blockDim.x * kVector;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (col + i < valid) largest = fmaxf(largest, in[j][i]);
      }
      if (largest > total[0]) total[1] *= expf(total[0] - largest);
      total[0] = largest;
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int col = from + j * blockDim.x * kVector;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (col + i < valid) total[1] += exp_for<T>(in[j][i] - largest);
      }
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
    cross_entropy_grad_kernel(int64_t rows, int64_t cols, int valid, int64_t start, T* logits, const int64_t* labels,
                              const float* max_in, const float* sum_in, const float* grad_in, float z_loss) {
  using V = Vector<T, kVector>;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.x) * blockDim.y) {
    T* const x = logits + row * cols;
    const float largest = max_in[row], grad = grad_in[row];
    const float factor = (1.0f + 2.0f * z_loss * (largest + logf(sum_in[row]))) / sum_in[row];
    const int64_t label = labels[row] - start;
    for (int64_t from = threadIdx.x * kVector; from < cols; from += kInFlight * blockDim.x * kVector) {
      V in[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t col = from + j * blockDim.x * kVector;
        if (col < valid) in[j] = load<kVector>(x + col);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t col = from + j * blockDim.x * kVector;
        if (col >= cols) continue;
        V out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float hit = col + i == label ? 1.0f : 0.0f;
          out.set(i, col + i < valid ? grad * (exp_for<T>(in[j][i] - largest) * factor - hit) : 0.0f);
        }
        store(x + col, out);
      }
    }
  }
}

template <typename T, int kVector>
int stats(int64_t rows, int64_t cols, int64_t valid, int64_t start, const void* logits, const int64_t* labels,
          float* max, float* sum, float* label_logit, void* stream) {
  const RowShape shape = row_shape(rows, divide_up(cols, kVector), kInFlight, rows);
  return launch(cross_entropy_stats_kernel<T, kVector>, shape.grid, shape.block, 0, stream, rows, cols,
                static_cast<int>(valid), start, static_cast<const T*>(logits), labels, max, sum, label_logit);
}

template <typename T, int kVector>
int gradient(int64_t rows, int64_t cols, int64_t valid, int64_t start, void* logits, const int64_t* labels,
             const float* max, const float* sum, const float* grad, float z_loss, void* stream) {
  const RowShape shape = row_shape(rows, divide_up(cols, kVector), kInFlight, rows);
  return launch(cross_entropy_grad_kernel<T, kVector>, shape.grid, shape.block, 0, stream, rows, cols,
                static_cast<int>(valid), start, static_cast<T*>(logits), labels, max, sum, grad, z_loss);
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
