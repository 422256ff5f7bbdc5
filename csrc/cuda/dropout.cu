// Dropout whose mask is a function of the seed and the element's global index: nothing is stored for the backward pass,
// and every slice of a tensor (a tensor-parallel rank's, a sequence-parallel rank's) is dropped as the whole would be.
// Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "columns.cuh"
#include "philox.cuh"

namespace mlite {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    dropout_kernel(int64_t rows, int64_t cols, int64_t row_stride, uint64_t offset, uint64_t threshold, float kept,
                   uint64_t seed, const T* x, T* y) {
  using V = Vector<T, kVector>;
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVector;
  if (col >= cols) return;
  for_rows<2, V>(
      rows, [&](V& in, int64_t row) { in = load<kVector>(x + row * cols + col); },
      [&](const V& in, int64_t row) {
        const uint64_t first = offset + row * row_stride + col;
        uint32_t words[4];
        V out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (i % 4 == 0) philox(seed, (first + i) / 4, words);
          uint32_t word = words[i % 4];
          if (kVector == 1) word = philox_word(words, first);  // else first is a multiple of 4
          out.set(i, in[i] * (word < threshold ? 0.0f : kept));
        }
        store(y + row * cols + col, out);
      });
}

template <typename T, int kVector>
int run(int64_t rows, int64_t cols, int64_t row_stride, uint64_t offset, double p, uint64_t seed, const void* x,
        void* y, void* stream) {
  const ColumnShape shape = column_shape(rows, divide_up(cols, kVector), rows);
  return launch(dropout_kernel<T, kVector>, shape.grid, shape.block, 0, stream, rows, cols, row_stride, offset,
                dropout_threshold(p), dropout_factor(p), seed, static_cast<const T*>(x), static_cast<T*>(y));
}

}  // namespace
}  // namespace mlite

using namespace mlite;

int mlite_cuda_dropout(int dtype, int64_t rows, int64_t cols, int64_t row_stride, uint64_t offset, double p,
                       uint64_t seed, const void* x, void* y, void* stream) {
  if (rows == 0 || cols == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const bool whole = (offset | static_cast<uint64_t>(row_stride)) % 4 == 0;
    const bool wide = whole && cols % kVector == 0 && aligned(x, y);
    return (wide ? run<T, kVector> : run<T, 1>)(rows, cols, row_stride, offset, p, seed, x, y, stream);
  });
}
