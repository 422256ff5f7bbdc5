// Bias + GELU (Hendrycks and Gimpel 2016), exact and by tanh, and bias + SwiGLU (Shazeer 2020), forward and backward.
//
// A thread keeps the same columns for all its rows: the bias is read once, the bias' gradient summed in registers.
// Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "columns.cuh"
#include "rows.cuh"

namespace mlite {
namespace {

constexpr float kRootHalf = 0.70710678118654752f, kRootTwoOverPi = 0.79788456080286536f;
constexpr float kInverseRootTwoPi = 0.39894228040143268f, kCubic = 0.044715f;

template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_for<T>(1.0f + exp_for<T>(-x));
}

// GELU where kTanh is false is x Phi(x); else x sigmoid(2u), which is 0.5 x (1 + tanh u) without its cancellation.
template <typename T, bool kTanh>
__device__ __forceinline__ float gelu(float x) {
  if (!kTanh) return 0.5f * x * (1.0f + erff(x * kRootHalf));
  return x * sigmoid<T>(2.0f * kRootTwoOverPi * (x + kCubic * x * x * x));
}

template <typename T, bool kTanh>
__device__ __forceinline__ float gelu_slope(float x) {
  if (!kTanh) return 0.5f * (1.0f + erff(x * kRootHalf)) + x * kInverseRootTwoPi * exp_for<T>(-0.5f * x * x);
  const float e = exp_for<T>(-2.0f * kRootTwoOverPi * (x + kCubic * x * x * x)), s = reciprocal_for<T>(1.0f + e);
  const float rest = e < 1.0f ? e * s : 1.0f - s;  // 1 - s, which would cancel where s nears 1
  return s + x * s * rest * 2.0f * kRootTwoOverPi * (1.0f + 3.0f * kCubic * x * x);
}

// x + bias; every kernel below adds it so.
template <typename T, int kVector>
struct Bias {
  float v[kVector] = {};
  __device__ Bias(const T* bias, int col) {
    if (!bias) return;
    const Vector<T, kVector> loaded = load<kVector>(bias + col);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = loaded[i];
  }
};

template <typename T, int kVector, bool kTanh>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    bias_gelu_forward_kernel(int64_t rows, int cols, const T* x, const T* bias, T* y) {
  using V = Vector<T, kVector>;
  const int col = first_column<kVector>();
  if (col >= cols) return;
  const Bias<T, kVector> shift(bias, col);
  for_rows<4, V>(
      rows, [&](V& in, int64_t row) { in = load<kVector>(x + row * cols + col); },
      [&](const V& in, int64_t row) {
        V out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) out.set(i, gelu<T, kTanh>(in[i] + shift.v[i]));
        store(y + row * cols + col, out);
      });
}

template <typename T, int kVector>
struct GeluInputs {
  Vector<T, kVector> x, dy;
};

template <typename T, int kVector, bool kTanh>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    bias_gelu_backward_kernel(int64_t rows, int cols, const T* dy, const T* x, const T* bias, T* dx, float* partial) {
  using In = GeluInputs<T, kVector>;
  const int col = first_column<kVector>();
  if (col >= cols) return;
  const Bias<T, kVector> shift(bias, col);
  float sums[kVector] = {};
  for_rows<2, In>(
      rows,
      [&](In& in, int64_t row) {
        in.x = load<kVector>(x + row * cols + col);
        in.dy = load<kVector>(dy + row * cols + col);
      },
      [&](const In& in, int64_t row) {
        Vector<T, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float gradient = in.dy[i] * gelu_slope<T, kTanh>(in.x[i] + shift.v[i]);
          out.set(i, gradient);
          sums[i] += gradient;
        }
        store(dx + row * cols + col, out);
      });
  if (partial) store_floats(partial + partial_row() * cols + col, sums);
}

template <typename T, int kVector>
struct SwigluInputs {
  Vector<T, kVector> gate, up, dy;
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    swiglu_forward_kernel(int64_t rows, int cols, const T* x, const T* bias, T* y) {
  using In = SwigluInputs<T, kVector>;
  const int col = first_column<kVector>();
  if (col >= cols) return;
  const Bias<T, kVector> gate_shift(bias, col), up_shift(bias ? bias + cols : nullptr, col);
  for_rows<2, In>(
      rows,
      [&](In& in, int64_t row) {
        in.gate = load<kVector>(x + 2 * row * cols + col);
        in.up = load<kVector>(x + (2 * row + 1) * cols + col);
      },
      [&](const In& in, int64_t row) {
        Vector<T, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float gate = in.gate[i] + gate_shift.v[i];
          out.set(i, gate * sigmoid<T>(gate) * (in.up[i] + up_shift.v[i]));
        }
        store(y + row * cols + col, out);
      });
}

// The many registers that this one needs leave room for one block less.
template <typename T, int kVector>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks - 1)
    swiglu_backward_kernel(int64_t rows, int cols, const T* dy, const T* x, const T* bias, T* dx, float* partial) {
  using In = SwigluInputs<T, kVector>;
  const int col = first_column<kVector>();
  if (col >= cols) return;
  const Bias<T, kVector> gate_shift(bias, col), up_shift(bias ? bias + cols : nullptr, col);
  float gate_sums[kVector] = {}, up_sums[kVector] = {};
  for_rows<2, In>(
      rows,
      [&](In& in, int64_t row) {
        in.gate = load<kVector>(x + 2 * row * cols + col);
        in.up = load<kVector>(x + (2 * row + 1) * cols + col);
        in.dy = load<kVector>(dy + row * cols + col);
      },
      [&](const In& in, int64_t row) {
        Vector<T, kVector> gate_out, up_out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float gate = in.gate[i] + gate_shift.v[i], s = sigmoid<T>(gate);
          const float dgate = in.dy[i] * (in.up[i] + up_shift.v[i]) * s * (1.0f + gate * (1.0f - s));
          const float dup = in.dy[i] * gate * s;
          gate_out.set(i, dgate);
          up_out.set(i, dup);
          gate_sums[i] += dgate;
          up_sums[i] += dup;
        }
        store(dx + 2 * row * cols + col, gate_out);
        store(dx + (2 * row + 1) * cols + col, up_out);
      });
  if (!partial) return;
  store_floats(partial + 2 * partial_row() * cols + col, gate_sums);
  store_floats(partial + (2 * partial_row() + 1) * cols + col, up_sums);
}

// Launches a backward kernel and, if there is a bias' gradient to give, sums its partial sums of `width` columns.
template <typename T, int kVector>
int backward(void (*kernel)(int64_t, int, const T*, const T*, const T*, T*, float*), int64_t rows, int64_t cols,
             int64_t width, const void* dy, const void* x, const void* bias, void* dx, float* dbias, float* workspace,
             int64_t workspace_rows, void* stream) {
  if (rows == 0 || cols == 0) return dbias ? column_sums(0, width, workspace, dbias, nullptr, stream) : 0;
  const ColumnShape shape = column_shape(rows, divide_up(cols, kVector), dbias ? workspace_rows : rows);
  const int error = launch(kernel, shape.grid, shape.block, 0, stream, rows, static_cast<int>(cols),
                           static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(bias),
                           static_cast<T*>(dx), dbias ? workspace : nullptr);
  if (error || !dbias) return error;
  return column_sums(int64_t(shape.grid.y) * shape.block.y, width, workspace, dbias, nullptr, stream);
}

template <typename T, int kVector>
int forward(void (*kernel)(int64_t, int, const T*, const T*, T*), int64_t rows, int64_t cols, const void* x,
            const void* bias, void* y, void* stream) {
  const ColumnShape shape = column_shape(rows, divide_up(cols, kVector), rows);
  return launch(kernel, shape.grid, shape.block, 0, stream, rows, static_cast<int>(cols), static_cast<const T*>(x),
                static_cast<const T*>(bias), static_cast<T*>(y));
}

}  // namespace
}  // namespace mlite

using namespace mlite;

int mlite_cuda_bias_gelu_forward(int dtype, bool tanh, int64_t rows, int64_t cols, const void* x, const void* bias,
                                 void* y, void* stream) {
  if (rows == 0 || cols == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    if (cols % kVector == 0 && aligned(x, bias, y)) {
      const auto kernel =
          tanh ? bias_gelu_forward_kernel<T, kVector, true> : bias_gelu_forward_kernel<T, kVector, false>;
      return forward<T, kVector>(kernel, rows, cols, x, bias, y, stream);
    }
    const auto kernel = tanh ? bias_gelu_forward_kernel<T, 1, true> : bias_gelu_forward_kernel<T, 1, false>;
    return forward<T, 1>(kernel, rows, cols, x, bias, y, stream);
  });
}

int mlite_cuda_bias_gelu_backward(int dtype, bool tanh, int64_t rows, int64_t cols, const void* dy, const void* x,
                                  const void* bias, void* dx, float* dbias, float* workspace, int64_t workspace_rows,
                                  void* stream) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    if (cols % kVector == 0 && aligned(dy, x, bias, dx, workspace)) {
      const auto kernel =
          tanh ? bias_gelu_backward_kernel<T, kVector, true> : bias_gelu_backward_kernel<T, kVector, false>;
      return backward<T, kVector>(kernel, rows, cols, cols, dy, x, bias, dx, dbias, workspace, workspace_rows, stream);
    }
    const auto kernel = tanh ? bias_gelu_backward_kernel<T, 1, true> : bias_gelu_backward_kernel<T, 1, false>;
    return backward<T, 1>(kernel, rows, cols, cols, dy, x, bias, dx, dbias, workspace, workspace_rows, stream);
  });
}

int mlite_cuda_swiglu_forward(int dtype, int64_t rows, int64_t cols, const void* x, const void* bias, void* y,
                              void* stream) {
  if (rows == 0 || cols == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    if (cols % kVector == 0 && aligned(x, bias, y))
      return forward<T, kVector>(swiglu_forward_kernel<T, kVector>, rows, cols, x, bias, y, stream);
    return forward<T, 1>(swiglu_forward_kernel<T, 1>, rows, cols, x, bias, y, stream);
  });
}

int mlite_cuda_swiglu_backward(int dtype, int64_t rows, int64_t cols, const void* dy, const void* x, const void* bias,
                               void* dx, float* dbias, float* workspace, int64_t workspace_rows, void* stream) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    if (cols % kVector == 0 && aligned(dy, x, bias, dx, workspace))
      return backward<T, kVector>(swiglu_backward_kernel<T, kVector>, rows, cols, 2 * cols, dy, x, bias, dx, dbias,
                                  workspace, workspace_rows, stream);
    return backward<T, 1>(swiglu_backward_kernel<T, 1>, rows, cols, 2 * cols, dy, x, bias, dx, dbias, workspace,
                          workspace_rows, stream);
  });
}
