// Dropout whose mask is a function of the seed and the element's global index: nothing is stored for the backward pass,
// and every slice of a tensor (a tensor-parallel rank's, a sequence-parallel rank's) is dropped as the whole would be.
//
// Random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), four elements a
// counter. Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "columns.cuh"

namespace mlite {
namespace {

// Words 0 to 3 for the counter (number's halves, 0, 0).
__device__ __forceinline__ void philox(uint64_t seed, uint64_t number, uint32_t (&words)[4]) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  words[0] = static_cast<uint32_t>(number);
  words[1] = static_cast<uint32_t>(number >> 32);
  words[2] = words[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * words[0], b = uint64_t(0xCD9E8D57u) * words[2];
    words[0] = static_cast<uint32_t>(b >> 32) ^ words[1] ^ key_0;
    words[2] = static_cast<uint32_t>(a >> 32) ^ words[3] ^ key_1;
    words[1] = static_cast<uint32_t>(b);
    words[3] = static_cast<uint32_t>(a);
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
}

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
          if (kVector == 1)  // else first is a multiple of 4; no run-time index, which would put words in memory
            word = first % 4 < 2 ? (first % 4 ? words[1] : words[0]) : (first % 4 == 2 ? words[2] : words[3]);
          out.set(i, in[i] * (word < threshold ? 0.0f : kept));
        }
        store(y + row * cols + col, out);
      });
}

template <typename T, int kVector>
int run(int64_t rows, int64_t cols, int64_t row_stride, uint64_t offset, double p, uint64_t seed, const void* x,
        void* y, void* stream) {
  const uint64_t threshold = p >= 1.0 ? uint64_t(1) << 32 : static_cast<uint64_t>(p * 4294967296.0);
  const float kept = p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  const ColumnShape shape = column_shape(rows, divide_up(cols, kVector), rows);
  return launch(dropout_kernel<T, kVector>, shape.grid, shape.block, 0, stream, rows, cols, row_stride, offset,
                threshold, kept, seed, static_cast<const T*>(x), static_cast<T*>(y));
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
