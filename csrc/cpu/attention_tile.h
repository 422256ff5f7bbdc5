// Matrix products of tiles, for attention: operands packed as words of 32 bits, and micro-kernels that keep their sums in
// registers.
//
// A word is what one lane multiplies in one instruction: a float or, where the machine has the instruction for it
// (vdpbf16ps), two bf16 numbers that are neighbours along the sum. Elsewhere bf16 tensors are packed as floats. In C = A B,
// A is packed by rows, [rows][words along the sum], whose words are broadcast, and B [words along the sum][columns], whose
// columns lie in the lanes. What a tensor lacks to fill its tile is packed as zeros.
#pragma once
#include "common.h"

// Stages are functions of their own: inlined into one, their vectors would compete for the registers.
#define MLITE_STAGE __attribute__((noinline))

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
constexpr int words_of(int64_t elements) { return static_cast<int>((elements + kPack<E> - 1) / kPack<E>); }

MLITE_INLINE inline Floats larger(Floats a, Floats b) {  // as largest_of: a NaN in b is passed over
#ifdef __AVX512F__
  return _mm512_maskz_max_ps(0xffff, b, a);
#else
  return largest_of(a, b);
#endif
}

// 2^t to about one unit in the last place; 2^-inf is 0. A fit of 2^f for 0 <= f <= 1, exact at 0.
MLITE_INLINE inline Floats exp2(Floats t) {
#ifdef __AVX512F__
  const Floats f = _mm512_maskz_reduce_ps(0xffff, t, 1);  // t - floor(t); of an infinity 0
#else
  t = t < -151.0f ? splat(-151.0f) : t;
  t = t > 129.0f ? splat(129.0f) : t;
  const Floats magic = splat(12582912.0f), shifted = (t - 0.5f) + magic, f = t - (shifted - magic);
#endif
  Floats p = splat(0.000216129279f);
  p = p * f + 0.00124678423f;
  p = p * f + 0.00967545155f;
  p = p * f + 0.0554852821f;
  p = p * f + 0.240229309f;
  p = p * f + 0.693147063f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return _mm512_maskz_scalef_ps(0xffff, p, t);
#else
  const Ints whole = bit_cast<Ints>(shifted) - bit_cast<Ints>(magic), half = whole >> 1;
  return p * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((whole - half + 127) << 23);
#endif
}

// log2(x), by two steps of Halley's method on 2^y; of 0 -inf.
MLITE_INLINE inline Floats log2(Floats x) {
  Floats y = __builtin_convertvector(bit_cast<Ints>(x), Floats) * (1.0f / (1 << 23)) - 127.0f;
  for (int step = 0; step < 2; ++step) {
    const Floats e = exp2(y);
    y += 2.88539008f * (x - e) / (x + e);
  }
  return x == 0.0f ? splat(-INFINITY) : y;
}

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
      for (int r = 0; add && r < kRows; ++r)
        for (int v = 0; v < width; ++v) sums[r][v] = load(out + r * c_row + v * kLanes, kLanes);
      multiply<E, kRows, width>(a + row * a_row, a_row, b + first * kLanes, b_row, depth, sums);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < width; ++v) store(out + r * c_row + v * kLanes, sums[r][v], kLanes);
    }
  });
}

// A square of vectors, as rows of lanes, is transposed in log2(kLanes) steps, each of which exchanges, between two rows,
// the lanes that have the step's bit set in the one and not set in the other.
#ifdef __AVX512F__
template <int kStep>
struct Exchange {
  alignas(64) uint32_t low[kLanes] = {}, high[kLanes] = {};  // sources of the lanes, those of the second row from kLanes on

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
  for (int i = 1; i < kLanes; ++i) rows[0] = bit_cast<Words>(op(bit_cast<Floats>(rows[0]), bit_cast<Floats>(rows[i])));
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

}  // namespace MLITE_ISA
}  // namespace mlite
