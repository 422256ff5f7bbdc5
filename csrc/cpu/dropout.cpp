// Dropout whose mask is a function of the seed and the element's global index.
#include "philox.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int kStep = 4 * kCounters, kWords = kStreams * kStep;  // drawn at a time

template <typename T>
void dropout_row(int64_t cols, uint64_t index, const Dropout& dropout, const T* x, T* y) {
  uint32_t words[kWords];
  for (int64_t col = 0; col < cols;) {
    const int64_t skipped = (index + col) % 4, left = cols - col;  // of the first counter's words
    uint64_t first[kStreams];
    uint32_t* out[kStreams];
    for (int i = 0; i < kStreams; ++i) first[i] = (index + col) / 4 + i * kCounters, out[i] = words + i * kStep;
    dropout.random.draw(first, out);
    const int64_t size = left < kWords - skipped ? left : kWords - skipped;
    for_vectors(size, [&](int64_t i, int count, int) MLITE_INLINE {
      const Words word = load_raw<Words>(words + skipped + i, count);
      const Floats factor = word < dropout.threshold ? splat(0) : splat(dropout.kept);
      store(y + col + i, load(x + col + i, count) * factor, count);
    });
    col += size;
  }
}

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(dropout)(int dtype, int64_t rows, int64_t cols, int64_t row_stride, uint64_t offset, double p,
                       uint64_t seed, const void* x, void* y) {
  const Dropout dropout(p, seed);
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, cols, [&](int64_t row) {
      dropout_row(cols, offset + row * row_stride, dropout, static_cast<const T*>(x) + row * cols,
                  static_cast<T*>(y) + row * cols);
    });
  });
}
