// Products of packed matrices, C = A B: micro-kernels that keep their sums in registers. A is packed by rows,
// [rows][words along the sum], whose words are broadcast, and B [words along the sum][columns], whose columns lie in
// the lanes.
#pragma once
#include "attention_pack.h"

namespace mlite {
namespace MLITE_ISA {

constexpr int kGroup = 4;  // rows of a micro-kernel
#if defined(__AVX512F__)
constexpr int kWidth = 4;  // at most so many vectors of columns: 4 x 4 sums, in 16 of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 3;
#else
constexpr int kWidth = 2;
#endif

// sum + a * b, of words.
template <typename E>
MLITE_INLINE inline Floats multiply_add(Floats sum, uint32_t a, Words b) {
#ifdef __AVX512BF16__
  if constexpr (kPack<E> == 2)
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(Words{} + a), bit_cast<__m512bh>(b));
#endif
  return sum + bit_cast<float>(a) * bit_cast<Floats>(b);
}

// (Not by = {}, which GCC writes to memory first.)
template <int kRows, int kVectors>
MLITE_INLINE inline void clear(Floats (&sums)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(0);
}

// sums += A B for kRows rows and kVectors vectors of columns; `depth` words along the sum.
template <typename E, int kRows, int kVectors>
MLITE_INLINE inline void multiply(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int depth,
                                  Floats (&sums)[kRows][kVectors]) {
#pragma GCC unroll 4
  for (int i = 0; i < depth; ++i) {
    Words columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load_raw<Words>(b + i * b_row + v * kLanes, kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<E>(sums[r][v], a[r * a_row + i], columns[v]);
  }
}

// body(width, first) for neighbouring vectors in parts of at most kWidth; width is an integral constant.
template <typename Body>
MLITE_INLINE inline void for_widths(int vectors, const Body& body) {
  const int parts = (vectors + kWidth - 1) / kWidth;
  for (int part = 0, first = 0; part < parts; ++part) {
    const int width = (vectors - first + parts - part - 1) / (parts - part);
    if (width == 1) body(std::integral_constant<int, 1>(), first);
    else if (width == 2) body(std::integral_constant<int, 2>(), first);
    else if (width == 3) body(std::integral_constant<int, (kWidth < 3 ? kWidth : 3)>(), first);
    else body(std::integral_constant<int, kWidth>(), first);
    first += width;
  }
}

// C = A B, or what `add` says is added to it; rows is a multiple of 2 * kGroup, columns of kLanes.
template <typename E>
MLITE_STAGE inline void product(bool add, int rows, int columns, int depth, const uint32_t* a, int64_t a_row,
                                const uint32_t* b, int64_t b_row, float* c, int64_t c_row) {
  for_widths(columns / kLanes, [&](auto width, int first) MLITE_INLINE {
    // Few columns need more rows for as many sums as keep the multipliers busy.
    constexpr int kRows = width <= kWidth / 2 ? 2 * kGroup : kGroup;
    for (int row = 0; row < rows; row += kRows) {
      float* const out = c + row * c_row + first * kLanes;
      Floats sums[kRows][width];
      clear(sums);
      multiply<E, kRows, width>(a + row * a_row, a_row, b + first * kLanes, b_row, depth, sums);
      // Added afterwards: each of the product's terms, added to a sum of many tiles, would be rounded to its places.
      for (int r = 0; add && r < kRows; ++r)
        for (int v = 0; v < width; ++v) sums[r][v] += load(out + r * c_row + v * kLanes, kLanes);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < width; ++v) store(out + r * c_row + v * kLanes, sums[r][v], kLanes);
    }
  });
}

}  // namespace MLITE_ISA
}  // namespace mlite
