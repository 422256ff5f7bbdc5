// What every CPU kernel here shares: vectors of one register, access to memory, exp, loops.
//
// Each source is compiled once per instruction set, with MLITE_ISA its name (avx512, avx2, baseline) and MLITE_LANES
// the floats in a register; entry.cpp chooses among them at run time. Everything is inline and lies in a namespace of
// that name, so that no function compiled for one instruction set can serve another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "functions.h"

#define MLITE_JOIN_(a, b) a##_##b
#define MLITE_JOIN(a, b) MLITE_JOIN_(a, b)
// The name of this build's mlite_cpu_NAME.
#define MLITE_CPU(name) MLITE_JOIN(mlite_cpu_##name, MLITE_ISA)
#define MLITE_INLINE __attribute__((always_inline))

// Definitions are checked against the header: no declaration with C linkage may differ from another.
#define MLITE_DECLARE(name) decltype(mlite_cpu_##name) MLITE_CPU(name);
extern "C" {
MLITE_CPU_FUNCTIONS(MLITE_DECLARE)
}
#undef MLITE_DECLARE

namespace mlite {
namespace MLITE_ISA {

constexpr int kLanes = MLITE_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

struct bf16 {
  uint16_t bits;
};

template <typename To, typename From>
MLITE_INLINE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

MLITE_INLINE inline Floats splat(float x) { return Floats{} + x; }

// `count` elements (at most kLanes, and a constant where it is kLanes), 0 in the lanes beyond.
template <typename Vector, typename T>
MLITE_INLINE inline Vector load_raw(const T* p, int count) {
  Vector v;
  if (count == kLanes) {
    memcpy(&v, p, sizeof(v));
    return v;
  }
#ifdef __AVX512F__
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) return bit_cast<Vector>(_mm512_maskz_loadu_epi32(mask, p));
  else if constexpr (sizeof(T) == 2) return bit_cast<Vector>(_mm256_maskz_loadu_epi16(mask, p));
  else return bit_cast<Vector>(_mm_maskz_loadu_epi8(mask, p));
#else
  T elements[kLanes];
  for (int i = 0; i < kLanes; ++i) elements[i] = i < count ? p[i] : T();
  memcpy(&v, elements, sizeof(v));
  return v;
#endif
}

template <typename Vector, typename T>
MLITE_INLINE inline void store_raw(T* p, Vector v, int count) {
  if (count == kLanes) {
    memcpy(p, &v, sizeof(v));
    return;
  }
#ifdef __AVX512F__
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, mask, bit_cast<__m512i>(v));
  else _mm256_mask_storeu_epi16(p, mask, bit_cast<__m256i>(v));
#else
  T elements[kLanes];
  memcpy(elements, &v, sizeof(v));
  for (int i = 0; i < count; ++i) p[i] = elements[i];
#endif
}

// Of each of these the compiler knows the general form, but makes several instructions where there is one.
#if defined(__AVX512F__)
// (The forms with a mask, all ones, because GCC 12 warns of its own definition of those without.)
MLITE_INLINE inline Words widen(Halves x) {
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(x)));
}
MLITE_INLINE inline Halves narrow(Words x) {
  return bit_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(x)));
}
#elif defined(__AVX2__)
MLITE_INLINE inline Words widen(Halves x) { return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x))); }
MLITE_INLINE inline Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
#else
MLITE_INLINE inline Words widen(Halves x) { return __builtin_convertvector(x, Words); }
MLITE_INLINE inline Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
#endif

MLITE_INLINE inline Floats load(const float* p, int count) { return load_raw<Floats>(p, count); }
MLITE_INLINE inline Floats load(const bf16* p, int count) {
  const Halves bits = load_raw<Halves>(reinterpret_cast<const uint16_t*>(p), count);
  return bit_cast<Floats>(widen(bits) << 16);
}

MLITE_INLINE inline void store(float* p, Floats x, int count) { store_raw(p, x, count); }
// Round to nearest even; a NaN stays one.
MLITE_INLINE inline Halves rounded(Floats x) {
#ifdef __AVX512BF16__
  // The instruction would take denormals for 0.
  if (__builtin_expect(!_mm512_fpclass_ps_mask(x, 0x20), 1)) return bit_cast<Halves>(_mm512_cvtneps_pbh(x));
#endif
  const Words bits = bit_cast<Words>(x), whole = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words chosen = x == x ? whole : (bits >> 16 | 0x40u);
  return narrow(chosen);
}
MLITE_INLINE inline void store(bf16* p, Floats x, int count) {
  store_raw(reinterpret_cast<uint16_t*>(p), rounded(x), count);
}

// Past the caches, which then need not read what is overwritten whole; for results larger than they are.
template <typename T>
MLITE_INLINE inline void stream(T* p, Floats x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, bit_cast<__m512>(x));
  else return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(rounded(x)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return _mm256_stream_ps(p, bit_cast<__m256>(x));
  else return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(rounded(x)));
#else
  store(p, x, kLanes);
#endif
}
// Whether rows of `cols` elements may be streamed to p, and it pays.
template <typename T>
inline bool streams(const T* p, int64_t rows, int64_t cols) {
  constexpr int64_t kVector = sizeof(T) * kLanes, kCaches = int64_t{16} << 20;
  return reinterpret_cast<uintptr_t>(p) % kVector == 0 && cols % kLanes == 0 &&
         rows * cols * static_cast<int64_t>(sizeof(T)) > kCaches;
}
// Streamed stores are ordered by this alone, not by the barrier at the end of a loop.
MLITE_INLINE inline void finish_streams() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

MLITE_INLINE inline float to_float(float x) { return x; }
MLITE_INLINE inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// All ones in the first `count` lanes, 0 in the others.
MLITE_INLINE inline Ints lanes_below(int count) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < count;
}

// x in the first `count` lanes, `rest` in the others.
MLITE_INLINE inline Floats first_of(Floats x, int count, float rest) {
  return count == kLanes ? x : lanes_below(count) ? x : splat(rest);
}

// b where it is larger (or smaller), a elsewhere, and where either is NaN: so a NaN in b is passed over. One instruction,
// which the compiler does not see in the general form.
#if defined(__AVX512F__)
MLITE_INLINE inline Floats largest_of(Floats a, Floats b) { return _mm512_maskz_max_ps(0xffff, b, a); }
MLITE_INLINE inline Floats smallest_of(Floats a, Floats b) { return _mm512_maskz_min_ps(0xffff, b, a); }
#elif defined(__AVX2__)
MLITE_INLINE inline Floats largest_of(Floats a, Floats b) { return _mm256_max_ps(b, a); }
MLITE_INLINE inline Floats smallest_of(Floats a, Floats b) { return _mm256_min_ps(b, a); }
#else
MLITE_INLINE inline Floats largest_of(Floats a, Floats b) { return b > a ? b : a; }
MLITE_INLINE inline Floats smallest_of(Floats a, Floats b) { return b < a ? b : a; }
#endif

// The lanes of x taken together by `both`, half with half.
template <int lanes, typename Vector, typename Both>
MLITE_INLINE inline float reduce(Vector x, const Both& both) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * lanes)));
    Half halves[2];
    memcpy(halves, &x, sizeof(x));
    return reduce<lanes / 2>(both(halves[0], halves[1]), both);
  }
}

template <int n>
MLITE_INLINE inline float sum_of(const Floats (&parts)[n]) {
  Floats total = parts[0];
  for (int i = 1; i < n; ++i) total += parts[i];
  return reduce<kLanes>(total, [](auto a, auto b) MLITE_INLINE { return a + b; });
}

template <int n>
MLITE_INLINE inline float max_of(const Floats (&parts)[n]) {
  Floats all = parts[0];
  for (int i = 1; i < n; ++i) all = largest_of(all, parts[i]);
  return reduce<kLanes>(all, [](auto a, auto b) MLITE_INLINE { return b > a ? b : a; });
}

// exp to about one unit in the last place, denormal results included: 2^n e^r with |r| <= log(2) / 2, and e^r =
// 1 + r + r^2 p(r), where p is a least-squares fit.
MLITE_INLINE inline Floats exp(Floats x) {
  // Beyond these bounds the result is 0 or inf anyhow; NaN passes both.
  x = smallest_of(largest_of(x, splat(-105.0f)), splat(89.0f));
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860682e-6f;
  // Few steps after one another rather than few in all: what takes time is their latency.
  const Floats square = r * r, low = 0.166665182f * r + 0.499999881f, high = 0.00836900342f * r + 0.0416695476f;
  const Floats p = (0.00137510907f * square + high) * square + low, q = (p * r + 1.0f) * r + 1.0f;
#ifdef __AVX512F__
  return _mm512_maskz_scalef_ps(0xffff, q, n);
#else
  // Two factors, because 2^n alone may be beyond the normal numbers.
  const Ints whole = bit_cast<Ints>(shifted) - bit_cast<Ints>(magic), half = whole >> 1;
  return q * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((whole - half + 127) << 23);
#endif
}

constexpr int kUnroll = 4;  // accumulators: as many additions as a core has in flight

// body(i, count, j) for each vector of `count` elements from i on; j in [0, kUnroll) is a constant for accumulators.
template <typename Body>
MLITE_INLINE inline void for_vectors(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
    body(i, kLanes, 0);
    body(i + kLanes, kLanes, 1);
    body(i + 2 * kLanes, kLanes, 2);
    body(i + 3 * kLanes, kLanes, 3);
  }
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes, 0);
  if (i < size) body(i, static_cast<int>(size - i), 0);
}

// body(row) for all rows, by all threads where there is work for them.
template <typename Body>
void for_rows(int64_t rows, int64_t cols, const Body& body) {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * cols >= 32768)
  for (int64_t row = 0; row < rows; ++row) body(row);
}

// For sums over rows: body(partial, row) adds a row to the partial sums of its block of neighbouring rows, and the
// blocks' sums are added in order. The blocks depend on nothing but the sizes: any number of threads gives the same
// bits. workspace: [blocks, width]; out: [width], of which the first `split` and the rest go apart.
template <typename Body>
void sum_over_rows(int64_t rows, int64_t width, int64_t split, float* workspace, int64_t workspace_rows, float* out,
                   float* rest, const Body& body) {
  const int64_t blocks = rows < workspace_rows ? rows : workspace_rows;
#pragma omp parallel for schedule(static) if (blocks > 1 && rows * width >= 32768)
  for (int64_t block = 0; block < blocks; ++block) {
    float* const partial = workspace + block * width;
    memset(partial, 0, sizeof(float) * width);
    for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) body(partial, row);
  }
  if (blocks == 0) memset(workspace, 0, sizeof(float) * width);
  constexpr int64_t kColumns = 1024;
#pragma omp parallel for schedule(static) if (blocks * width >= 65536 && width > kColumns)
  for (int64_t start = 0; start < width; start += kColumns) {
    float* const sum = workspace + start;
    for (int64_t block = 1; block < blocks; ++block) {
      const float* const more = sum + block * width;
      for_vectors(width - start < kColumns ? width - start : kColumns, [&](int64_t i, int count, int) MLITE_INLINE {
        store(sum + i, load(sum + i, count) + load(more + i, count), count);
      });
    }
  }
  memcpy(out, workspace, sizeof(float) * split);
  if (split < width) memcpy(rest, workspace + split, sizeof(float) * (width - split));
}

// Calls body with a null pointer of the element type of `dtype`; 1 if the CPU has no such kernels.
template <typename Body>
int dispatch(int dtype, const Body& body) {
  if (dtype == MLITE_F32) body(static_cast<float*>(nullptr));
  else if (dtype == MLITE_BF16) body(static_cast<bf16*>(nullptr));
  else return 1;
  return 0;
}

}  // namespace MLITE_ISA
}  // namespace mlite
