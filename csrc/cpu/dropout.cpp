// Dropout whose mask is a function of the seed and the element's global index. Random numbers: Philox4x32-10 (Salmon et
// al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), four elements a counter, many counters at a time.
#include "common.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int kCounters = 64, kWords = 4 * kCounters;

// Words 0 to 3 of each of the counters (number's halves, 0, 0), number from `first` on, in the order of the elements.
void philox(uint64_t seed, uint64_t first, uint32_t (&words)[kWords]) {
  uint32_t w[4][kCounters], key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < kCounters; ++i) {
    w[0][i] = static_cast<uint32_t>(first + i);
    w[1][i] = static_cast<uint32_t>((first + i) >> 32);
    w[2][i] = w[3][i] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t a = uint64_t(0xD2511F53u) * w[0][i], b = uint64_t(0xCD9E8D57u) * w[2][i];
      w[0][i] = static_cast<uint32_t>(b >> 32) ^ w[1][i] ^ key_0;
      w[2][i] = static_cast<uint32_t>(a >> 32) ^ w[3][i] ^ key_1;
      w[1][i] = static_cast<uint32_t>(b);
      w[3][i] = static_cast<uint32_t>(a);
    }
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCounters; ++i)
    for (int j = 0; j < 4; ++j) words[4 * i + j] = w[j][i];
}

template <typename T>
void dropout_row(int64_t cols, uint64_t index, uint32_t threshold, float kept, uint64_t seed, const T* x, T* y) {
  uint32_t words[kWords];
  for (int64_t col = 0; col < cols;) {
    const int64_t skipped = (index + col) % 4, left = cols - col;  // of the first counter's words
    philox(seed, (index + col) / 4, words);
    const int64_t size = left < kWords - skipped ? left : kWords - skipped;
    for_vectors(size, [&](int64_t i, int count, int) MLITE_INLINE {
      const Words word = load_raw<Words>(words + skipped + i, count);
      store(y + col + i, load(x + col + i, count) * (word < threshold ? splat(0) : splat(kept)), count);
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
  // Where p is 1, what is kept is 0 too, so that the threshold, which has no room for 2^32, does not matter.
  const uint32_t threshold = p >= 1.0 ? 0 : static_cast<uint32_t>(p * 4294967296.0);
  const float kept = p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, cols, [&](int64_t row) {
      dropout_row(cols, offset + row * row_stride, threshold, kept, seed, static_cast<const T*>(x) + row * cols,
                  static_cast<T*>(y) + row * cols);
    });
  });
}
