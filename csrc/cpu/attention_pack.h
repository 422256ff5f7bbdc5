// Operands of matrix products, packed as words of 32 bits.
//
// A word is what one lane multiplies in one instruction: a float or, where the machine has the instruction for it
// (vdpbf16ps), two bf16 numbers that are neighbours along the sum. Elsewhere bf16 tensors are packed as floats. What a
// tensor lacks to fill its tile is packed as zeros.
#pragma once
#include "common.h"

// Stages are functions of their own: inlined into one, their vectors would compete for the registers.
#define MLITE_STAGE __attribute__((noinline))

namespace mlite {
namespace MLITE_ISA {

// The type that stands packed for T.
#ifdef __AVX512BF16__
template <typename T>
using Packed = T;
#else
template <typename T>
using Packed = float;
#endif
template <typename E>
constexpr int kPack = 4 / sizeof(E);  // elements of a word

constexpr int round_up(int64_t x, int step) { return static_cast<int>((x + step - 1) / step * step); }
template <typename E>
constexpr int words_of(int64_t elements) {
  return static_cast<int>((elements + kPack<E> - 1) / kPack<E>);
}

// A square of vectors, as rows of lanes, is transposed in log2(kLanes) steps, each of which exchanges, between two
// rows, the lanes that have the step's bit set in the one and not set in the other.
#ifdef __AVX512F__
template <int kStep>
struct Exchange {
  // Sources of the lanes, those of the second row from kLanes on.
  alignas(64) uint32_t low[kLanes] = {}, high[kLanes] = {};

  constexpr Exchange() {
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & kStep ? i - kStep + kLanes : i;
      high[i] = i & kStep ? i + kLanes : i + kStep;
    }
  }
};
template <int kStep>
MLITE_INLINE inline void exchange(Words& a, Words& b) {
  static constexpr Exchange<kStep> kOrder;
  const __m512i first = bit_cast<__m512i>(a), second = bit_cast<__m512i>(b);
  a = bit_cast<Words>(_mm512_permutex2var_epi32(first, _mm512_load_si512(kOrder.low), second));
  b = bit_cast<Words>(_mm512_permutex2var_epi32(first, _mm512_load_si512(kOrder.high), second));
}
template <int kStep = 1>
MLITE_INLINE inline void transpose(Words (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep]);
  if constexpr (2 * kStep < kLanes) transpose<2 * kStep>(rows);
}
// Lane i of rows[0]: op over the lanes of row i.
template <int kStep = 1, typename Op>
MLITE_INLINE inline void reduce_rows(Words (&rows)[kLanes], const Op& op) {
  for (int i = 0; i < kLanes; i += 2 * kStep) {
    exchange<kStep>(rows[i], rows[i + kStep]);
    rows[i] = bit_cast<Words>(op(bit_cast<Floats>(rows[i]), bit_cast<Floats>(rows[i + kStep])));
  }
  if constexpr (2 * kStep < kLanes) reduce_rows<2 * kStep>(rows, op);
}
#else
inline void transpose(Words (&rows)[kLanes]) {
  uint32_t square[kLanes][kLanes];
  memcpy(square, rows, sizeof(square));
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) rows[i][j] = square[j][i];
}
template <typename Op>
MLITE_INLINE inline void reduce_rows(Words (&rows)[kLanes], const Op& op) {
  transpose(rows);
  Floats all = bit_cast<Floats>(rows[0]);
  for (int i = 1; i < kLanes; ++i) all = op(all, bit_cast<Floats>(rows[i]));
  rows[0] = bit_cast<Words>(all);
}
#endif

// Lane i: op over the lanes of row i.
template <typename Op>
MLITE_INLINE inline Floats over_rows(const float (*rows)[kLanes], const Op& op) {
  Words all[kLanes];
  for (int i = 0; i < kLanes; ++i) all[i] = bit_cast<Words>(load(rows[i], kLanes));
  reduce_rows(all, op);
  return bit_cast<Floats>(all[0]);
}
MLITE_INLINE inline Floats sum_rows(const float (*rows)[kLanes]) {
  return over_rows(rows, [](Floats x, Floats y) MLITE_INLINE { return x + y; });
}

// Rows of a tensor, of which `rows` times `columns` elements count.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int rows, columns;

  Rows from(int row) const { return {data + row * stride, stride, rows - row, columns}; }
};

// kLanes words along row r, from word w on.
template <typename E, typename T>
MLITE_INLINE inline Words words_along(const Rows<T>& x, int r, int w) {
  const int left = x.columns - w * kPack<E>;
  if (r >= x.rows || left <= 0) return Words{};
  const T* const from = x.data + r * x.stride + w * kPack<E>;
#ifdef __AVX512BF16__
  if constexpr (kPack<E> == 2)
    return bit_cast<Words>(_mm512_maskz_loadu_epi16(left < 32 ? (1u << left) - 1 : ~0u, from));
#endif
  return bit_cast<Words>(left < kLanes ? load(from, left) : load(from, kLanes));
}

// Words that reach across rows, of word row w and columns from `first` on.
template <typename E, typename T>
MLITE_INLINE inline Words words_across(const Rows<T>& x, int w, int first) {
#ifdef __AVX512BF16__
  if constexpr (kPack<E> == 2) {
    const int left = x.columns - first;
    const __mmask16 columns = left <= 0 ? 0 : left < kLanes ? (1u << left) - 1 : 0xffffu;
    __m256i rows[2];
    for (int i = 0; i < 2; ++i) {
      const bool there = 2 * w + i < x.rows;
      rows[i] = _mm256_maskz_loadu_epi16(there ? columns : 0, there ? x.data + (2 * w + i) * x.stride + first : x.data);
    }
    return widen(bit_cast<Halves>(rows[0])) | widen(bit_cast<Halves>(rows[1])) << 16;
  }
#endif
  return words_along<E>(x, w, first);
}

// Packs x for at least `rows` x `columns` words, multiples of kLanes where they are transposed:
//  along: word (r, w) holds the elements of row r from w * kPack on; across: word (w, c) those of column c.
// out: [rows][out_row], transposed [columns][out_row].
template <typename E, bool kAcross, bool kTransposed, typename T>
MLITE_STAGE inline void pack(const Rows<T>& x, int rows, int columns, uint32_t* out, int64_t out_row) {
  const auto words = [&](int r, int c) MLITE_INLINE {
    if constexpr (kAcross) return words_across<E>(x, r, c);
    else return words_along<E>(x, r, c);
  };
  for (int c = 0; c < columns; c += kLanes) {
    if constexpr (!kTransposed) {
      for (int r = 0; r < rows; ++r) store_raw(out + r * out_row + c, words(r, c), kLanes);
    } else {
      for (int r = 0; r < rows; r += kLanes) {
        Words square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = words(r + i, c);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store_raw(out + (c + i) * out_row + r, square[i], kLanes);
      }
    }
  }
}

#ifdef __AVX512BF16__
// Two vectors as bf16, rounded to nearest even: a's elements, then b's.
MLITE_INLINE inline Words to_bf16(Floats a, Floats b) { return bit_cast<Words>(_mm512_cvtne2ps_pbh(b, a)); }
// The same, with a's elements in the lower and b's in the upper halves of the words.
MLITE_INLINE inline Words to_pairs(Floats a, Floats b) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bit_cast<Words>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), bit_cast<__m512i>(to_bf16(a, b))));
}
#endif


// Rows that will be needed next, fetched into the second cache a few at a time while something else is computed.
template <typename T>
class Prefetch {
 public:
  // Of two tensors side by side.
  void add(const Rows<T>& first, const Rows<T>& second) { sets_[count_][0] = first, sets_[count_++][1] = second; }
  void add(const Rows<T>& rows) { add(rows, {rows.data, 0, 0, 0}); }

  void step(int rows) {
    for (; rows > 0 && set_ < count_; --rows) {
      for (const Rows<T>& x : sets_[set_])
        if (row_ < x.rows)
          for (int c = 0; c < x.columns; c += 64 / static_cast<int>(sizeof(T)))
            __builtin_prefetch(x.data + row_ * x.stride + c, 0, 2);
      if (++row_ >= sets_[set_][0].rows) ++set_, row_ = 0;
    }
  }
  // Of the first tensors.
  int rows() const {
    int total = 0;
    for (int i = 0; i < count_; ++i) total += sets_[i][0].rows;
    return total;
  }

 private:
  Rows<T> sets_[4][2];
  int count_ = 0, set_ = 0, row_ = 0;
};

}  // namespace MLITE_ISA
}  // namespace mlite
