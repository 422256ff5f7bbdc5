// LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), with the residual addition before them.
//
// Forward: one read of x (and residual), one write of y (and sum); the row stays in registers between the mean, the
// variance about that mean and the output. Backward: one read of dy, x (and dsum), one write of dx; each thread keeps
// the same columns for all rows of its group and so sums dweight and dbias in registers.
// Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "rows.cuh"

namespace mlite {
namespace {

template <typename T, int kVector, int kPer>
__global__ void __launch_bounds__(kMaxGroup)
    norm_forward_kernel(bool rms, int64_t rows, int cols, float eps, const T* x, const T* residual, const T* weight,
                        const T* bias, T* y, T* sum, float* mean_out, float* rstd_out) {
  using V = Vector<T, kVector>;
  int phase = 0;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t start = row * cols;
    const auto read = [&](V& value, int col) {
      value = load<kVector>(x + start + col);
      if (!residual) return;
      const V other = load<kVector>(residual + start + col);
#pragma unroll
      for (int i = 0; i < kVector; ++i) value.set(i, value[i] + other[i]);
    };
    V cache[kPer];
    float total[1] = {0}, square[1] = {0};
    read_row<kVector>(cache, cols, read, [&](const V& value, int col) {
      if (residual) store(sum + start + col, value);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[0] += rms ? value[i] * value[i] : value[i];
    });
    group_reduce(total, phase, Add());
    const float mean = rms ? 0.0f : total[0] / cols;
    if (rms) {
      square[0] = total[0];
    } else {
      visit_row<kVector>(cache, cols, read, [&](const V& value, int) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) square[0] += (value[i] - mean) * (value[i] - mean);
      });
      group_reduce(square, phase, Add());
    }
    const float rstd = rsqrtf(square[0] / cols + eps);
    visit_row<kVector>(cache, cols, read, [&](const V& value, int col) {
      const V scale = load<kVector>(weight + col);
      V out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) out.set(i, (value[i] - mean) * rstd * scale[i]);
      if (bias) {
        const V shift = load<kVector>(bias + col);
#pragma unroll
        for (int i = 0; i < kVector; ++i) out.set(i, (value[i] - mean) * rstd * scale[i] + shift[i]);
      }
      store(y + start + col, out);
    });
    if (threadIdx.x == 0) {
      if (mean_out) mean_out[row] = mean;
      rstd_out[row] = rstd;
    }
  }
}

// The two inputs of the backward pass at the same columns.
template <typename T, int kVector>
struct Pair {
  Vector<T, kVector> x, dy;
};

template <int kVector>
__device__ __forceinline__ void add_to(float* sums, const float (&more)[kVector], bool first) {
  float total[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) total[i] = first ? more[i] : sums[i] + more[i];
  store_floats(sums, total);
}

template <typename T, int kVector, int kPer, bool kBias>
__global__ void __launch_bounds__(kMaxGroup)
    norm_backward_kernel(bool rms, int64_t rows, int cols, int64_t groups, const T* dy, const T* dsum, const T* x,
                         const T* weight, const float* mean_in, const float* rstd_in, T* dx, float* partial) {
  using V = Vector<T, kVector>;
  using P = Pair<T, kVector>;
  const int64_t group = first_row();
  if (group >= groups) return;  // of one-warp groups only, which share no barrier
  float* const dweight = partial + group * cols;
  float* const dbias = partial + (groups + group) * cols;
  float weight_sums[kPer][kVector] = {}, bias_sums[kBias ? kPer : 1][kVector] = {};
  int phase = 0;
  for (int64_t row = group; row < rows; row += groups) {
    const int64_t start = row * cols;
    const float mean = rms ? 0.0f : mean_in[row], rstd = rstd_in[row];
    P cache[kPer];
    float sums[2] = {0, 0};  // of g and of g * xhat, where g = dy * weight
    const auto read = [&](P& pair, int col) {
      pair.x = load<kVector>(x + start + col);
      pair.dy = load<kVector>(dy + start + col);
    };
    read_row<kVector>(cache, cols, read, [&](const P& pair, int col) {
      const V scale = load<kVector>(weight + col);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float g = pair.dy[i] * scale[i];
        sums[0] += g;
        sums[1] += g * (pair.x[i] - mean) * rstd;
      }
    });
    V after[kPer];  // dsum's part, on its way while the sums are; no registers are left for it beside a bias' sums
    if (!kBias && dsum) {
#pragma unroll
      for (int tile = 0; tile < kPer; ++tile) {
        const int col = (tile * blockDim.x + threadIdx.x) * kVector;
        if (col < cols) after[tile] = load<kVector>(dsum + start + col);
      }
    }
    group_reduce(sums, phase, Add());
    const float offset = rms ? 0.0f : sums[0] / cols, slope = sums[1] / cols;
    const auto finish = [&](const P& pair, V out, bool loaded, int col, float (&dw)[kVector], float (&db)[kVector]) {
      const V scale = load<kVector>(weight + col);
      if (dsum && !loaded) out = load<kVector>(dsum + start + col);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float normed = (pair.x[i] - mean) * rstd;
        const float gradient = (pair.dy[i] * scale[i] - offset - normed * slope) * rstd;
        out.set(i, dsum ? gradient + out[i] : gradient);
        dw[i] += pair.dy[i] * normed;
        if (kBias) db[i] += pair.dy[i];
      }
      store(dx + start + col, out);
    };
#pragma unroll
    for (int tile = 0; tile < kPer; ++tile) {
      const int col = (tile * blockDim.x + threadIdx.x) * kVector;
      if (col < cols) finish(cache[tile], after[tile], !kBias, col, weight_sums[tile], bias_sums[kBias ? tile : 0]);
    }
#pragma unroll 1
    for (int col = (kPer * blockDim.x + threadIdx.x) * kVector; col < cols; col += blockDim.x * kVector) {
      P pair;
      read(pair, col);
      float dw[kVector] = {}, db[kVector] = {};
      finish(pair, V(), false, col, dw, db);
      add_to(dweight + col, dw, row == group);  // beyond the registers the sums stay in the workspace
      if (kBias) add_to(dbias + col, db, row == group);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kPer; ++tile) {
    const int col = (tile * blockDim.x + threadIdx.x) * kVector;
    if (col >= cols) continue;
    store_floats(dweight + col, weight_sums[tile]);
    if (kBias) store_floats(dbias + col, bias_sums[tile]);
  }
}

template <typename T, int kVector>
int forward(bool rms, int64_t rows, int64_t cols, float eps, const T* x, const T* residual, const T* weight,
            const T* bias, T* y, T* sum, float* mean, float* rstd, void* stream) {
  constexpr int kPer = kVector == 1 ? 8 : 32 / kVector;
  const RowShape shape = row_shape(rows, divide_up(cols, kVector), kPer, rows);
  return launch(norm_forward_kernel<T, kVector, kPer>, shape.grid, shape.block, 0, stream, rms, rows,
                static_cast<int>(cols), eps, x, residual, weight, bias, y, sum, mean, rstd);
}

template <typename T, int kVector>
int backward(bool rms, int64_t rows, int64_t cols, const T* dy, const T* dsum, const T* x, const T* weight,
             const float* mean, const float* rstd, T* dx, float* dweight, float* dbias, float* workspace,
             int64_t workspace_rows, void* stream) {
  constexpr int kPer = kVector == 1 ? 4 : 16 / kVector;
  if (rows == 0) return column_sums(0, cols, workspace, dweight, dbias, stream);
  const RowShape shape = row_shape(rows, divide_up(cols, kVector), kPer, workspace_rows);
  const int64_t most = int64_t(shape.grid) * shape.block.y, work = rows < workspace_rows ? rows : workspace_rows;
  const int64_t groups = most < work ? most : work;
  const auto kernel =
      dbias ? norm_backward_kernel<T, kVector, kPer, true> : norm_backward_kernel<T, kVector, kPer, false>;
  const int error = launch(kernel, shape.grid, shape.block, 0, stream, rms, rows, static_cast<int>(cols), groups, dy,
                           dsum, x, weight, mean, rstd, dx, workspace);
  return error ? error : column_sums(groups, cols, workspace, dweight, dbias, stream);
}

}  // namespace
}  // namespace mlite

using namespace mlite;

int64_t mlite_cuda_workspace_rows(int64_t rows, int64_t cols) {
  // Half of the threads that can be resident: as many bytes in flight as hide memory's latency, few partial sums.
  const int64_t per_row = cols / 16 < kWarp ? kWarp : cols / 16 > kMaxGroup ? kMaxGroup : cols / 16;
  const int64_t groups = int64_t(multiprocessors()) * 1024 / per_row;
  return rows < groups ? (rows < 1 ? 1 : rows) : groups;
}

int mlite_cuda_norm_forward(int dtype, bool rms, int64_t rows, int64_t cols, float eps, const void* x,
                            const void* residual, const void* weight, const void* bias, void* y, void* sum, float* mean,
                            float* rstd, void* stream) {
  if (rows == 0 || cols == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const bool wide = cols % kVector == 0 && aligned(x, residual, weight, bias, y, sum);
    return (wide ? forward<T, kVector> : forward<T, 1>)(
        rms, rows, cols, eps, static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
        static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(sum), mean, rstd, stream);
  });
}

int mlite_cuda_norm_backward(int dtype, bool rms, int64_t rows, int64_t cols, const void* dy, const void* dsum,
                             const void* x, const void* weight, const float* mean, const float* rstd, void* dx,
                             float* dweight, float* dbias, float* workspace, int64_t workspace_rows, void* stream) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const bool wide = cols % kVector == 0 && aligned(dy, dsum, x, weight, dx, workspace);
    return (wide ? backward<T, kVector> : backward<T, 1>)(
        rms, rows, cols, static_cast<const T*>(dy), static_cast<const T*>(dsum), static_cast<const T*>(x),
        static_cast<const T*>(weight), mean, rstd, static_cast<T*>(dx), dweight, dbias, workspace, workspace_rows,
        stream);
  });
}
