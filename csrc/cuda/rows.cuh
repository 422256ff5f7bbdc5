// Kernels that work row by row: how rows are dealt to threads, and how a row is read once and reduced.
//
// A group of blockDim.x threads holds one row in registers, kPer vectors a thread, thread by thread next to each other:
// vector number tile * blockDim.x + threadIdx.x. What of a very long row does not fit is read again (from L2) by each
// visit. Short rows take one warp, four of them a block, which then needs no block barrier; groups loop over the rows.
#pragma once

#include "common.cuh"

namespace mlite {

constexpr int kMaxGroup = 512;    // threads; 128 registers each are left
constexpr int kResident = 1024;   // threads that a multiprocessor holds of these kernels, by their registers

struct RowShape {
  dim3 block;
  unsigned grid;
};

// The launch for `rows` rows of `vectors` vectors, by at most `groups` groups.
inline RowShape row_shape(int64_t rows, int64_t vectors, int per_thread, int64_t groups) {
  const int64_t wanted = divide_up(divide_up(vectors, per_thread), kWarp) * kWarp;
  const unsigned x = static_cast<unsigned>(wanted < kWarp ? kWarp : wanted > kMaxGroup ? kMaxGroup : wanted);
  const unsigned y = x == kWarp ? 4 : 1;
  const int64_t work = rows < groups ? rows : groups;
  return {dim3(x, y), persistent_grid(divide_up(work, y), kResident / static_cast<int>(x * y))};
}

// The rows of a group: first_row(), and on by row_step().
__device__ __forceinline__ int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }

// Calls read(vector's place in the cache, column) for all that fit first, so that the loads are in flight together;
// then visit(place, column) for each, and both in turn for what does not fit.
template <int kVector, int kPer, typename V, typename Read, typename Visit>
__device__ __forceinline__ void read_row(V (&cache)[kPer], int cols, Read read, Visit visit) {
#pragma unroll
  for (int tile = 0; tile < kPer; ++tile) {
    const int col = (tile * blockDim.x + threadIdx.x) * kVector;
    if (col < cols) read(cache[tile], col);
  }
#pragma unroll
  for (int tile = 0; tile < kPer; ++tile) {
    const int col = (tile * blockDim.x + threadIdx.x) * kVector;
    if (col < cols) visit(cache[tile], col);
  }
#pragma unroll 1
  for (int col = (kPer * blockDim.x + threadIdx.x) * kVector; col < cols; col += blockDim.x * kVector) {
    V value;
    read(value, col);
    visit(value, col);
  }
}

// The same for a row that read_row has read.
template <int kVector, int kPer, typename V, typename Read, typename Visit>
__device__ __forceinline__ void visit_row(V (&cache)[kPer], int cols, Read read, Visit visit) {
#pragma unroll
  for (int tile = 0; tile < kPer; ++tile) {
    const int col = (tile * blockDim.x + threadIdx.x) * kVector;
    if (col < cols) visit(cache[tile], col);
  }
#pragma unroll 1
  for (int col = (kPer * blockDim.x + threadIdx.x) * kVector; col < cols; col += blockDim.x * kVector) {
    V value;
    read(value, col);
    visit(value, col);
  }
}

// What group_reduce makes of N numbers and N others.
struct Add {
  template <int N>
  __device__ __forceinline__ void operator()(float (&mine)[N], const float (&other)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) mine[i] += other[i];
  }
};

struct Largest {
  __device__ __forceinline__ void operator()(float (&mine)[1], const float (&other)[1]) const {
    mine[0] = fmaxf(mine[0], other[0]);
  }
};

// Combines the values of a group in all its threads, always in the same order. `phase` alternates between two scratch
// areas, so that one barrier is enough: who writes an area again has passed the barrier after its last reading.
template <int N, typename Operation>
__device__ __forceinline__ void group_reduce(float (&value)[N], int& phase, Operation operation) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    float other[N];
#pragma unroll
    for (int i = 0; i < N; ++i) other[i] = __shfl_xor_sync(kAllLanes, value[i], lanes);
    operation(value, other);
  }
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
  constexpr int kArea = kMaxGroup / kWarp * N;
  MLITE_SHARED_ARRAY(float, scratch, 2 * kArea);
  float* const area = scratch + phase * kArea;
  phase ^= 1;
  if (threadIdx.x % kWarp == 0)
    for (int i = 0; i < N; ++i) area[threadIdx.x / kWarp * N + i] = value[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = area[i];
  for (int warp = 1; warp < warps; ++warp) {
    float other[N];
#pragma unroll
    for (int i = 0; i < N; ++i) other[i] = area[warp * N + i];
    operation(value, other);
  }
}

constexpr int kSumRows = 16;

// out[part][col] = sum over rows of partial[part][row][col]; one part per blockIdx.y, 32 columns a block.
static __global__ void column_sums_kernel(int64_t rows, int cols, const float* partial, float* out, float* out_1) {
  MLITE_SHARED_ARRAY(float, sums, kSumRows * kWarp);
  const int col = blockIdx.x * kWarp + threadIdx.x;
  float sum = 0;
  if (col < cols)
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows)
      sum += partial[(blockIdx.y * rows + row) * cols + col];
  sums[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  for (int row = 1; row < kSumRows; ++row) sum += sums[row * kWarp + threadIdx.x];
  (blockIdx.y ? out_1 : out)[col] = sum;
}

// The second step of the gradients of weights; out_1 may be absent. No rows: zeros.
inline int column_sums(int64_t rows, int64_t cols, const float* partial, float* out, float* out_1, void* stream) {
  if (cols == 0) return 0;
  return launch(column_sums_kernel, dim3(divide_up(cols, kWarp), out_1 ? 2 : 1), dim3(kWarp, kSumRows), 0, stream, rows,
                static_cast<int>(cols), partial, out, out_1);
}

}  // namespace mlite
