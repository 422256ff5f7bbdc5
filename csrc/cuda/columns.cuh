// Elementwise kernels: a thread owns kVector neighbouring columns and walks down the rows, several loads in flight.
#pragma once

#include "common.cuh"

namespace mlite {

constexpr int kColumnThreads = 256;  // of a block; and so many blocks shall fit on a multiprocessor:
constexpr int kColumnBlocks = 3;

struct ColumnShape {
  dim3 grid, block;
};

// The launch over rows x vectors; grid.y * block.y, the number of walks down the rows, is at most `walks`.
inline ColumnShape column_shape(int64_t rows, int64_t vectors, int64_t walks) {
  unsigned x = 1;  // a power of two, so that a block is full; neighbouring rows fill up a warp
  while (x < 128 && x < vectors) x *= 2;
  const int64_t most = walks < rows ? walks : rows;
  const unsigned y = static_cast<unsigned>(most < kColumnThreads / x ? most : kColumnThreads / x);
  const int64_t across = divide_up(vectors, x);
  int64_t down = int64_t(multiprocessors()) * 2 * kColumnBlocks / across;  // two full waves, no rest
  const int64_t useful = divide_up(rows, y), allowed = most / y;
  down = down < 1 ? 1 : down < useful ? down : useful;
  down = down < allowed ? down : allowed;
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down < 65535 ? down : 65535)), dim3(x, y)};
}

template <int kVector>
__device__ __forceinline__ int first_column() {
  return (blockIdx.x * blockDim.x + threadIdx.x) * kVector;
}

// Which of the walks down the rows this thread is on.
__device__ __forceinline__ int64_t partial_row() { return int64_t(blockIdx.y) * blockDim.y + threadIdx.y; }

// For the rows of this walk: read(value, row) for kInFlight at a time, then finish(value, row) for each of those. A row
// may be overwritten in place, since only its own thread reads those columns of it, before.
template <int kInFlight, typename In, typename Read, typename Finish>
__device__ __forceinline__ void for_rows(int64_t rows, Read read, Finish finish) {
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = partial_row(); row < rows; row += step * kInFlight) {
    In in[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (row + i * step < rows) read(in[i], row + i * step);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (row + i * step < rows) finish(in[i], row + i * step);
  }
}

}  // namespace mlite
