// Dropout of attention's probabilities: which fall is a function of their global index (attention.h), so the backward
// pass draws them again.
#pragma once
#include "attention_tile.cuh"
#include "philox.cuh"

namespace mlite {

// Swaps bits between this lane and that `lanes` (a power of two) away: the lower one's bits outside `low` with the
// upper one's `low`, `shift` places apart.
template <int lanes, int shift, uint32_t low>
__device__ __forceinline__ uint32_t swap_bits(uint32_t bits) {
  const uint32_t other = __shfl_xor_sync(kAllLanes, bits, lanes);
  return threadIdx.x & lanes ? (bits & ~low) | (other & ~low) >> shift : (bits & low) | (other & low) << shift;
}

// Bit 4 n + e: whether element e of fragment n of a [16, 8 NT] tile of probabilities is dropped. `plane` counts the
// heads of all batch entries; `row` and `column` as in mask_scores.
template <bool KeyRows, int NT>
__device__ __forceinline__ uint32_t dropped(const Attention& p, int64_t plane, int row, int column) {
  static_assert(NT <= 8, "a bit for each element");
  const int lane = here(threadIdx.x % kWarp), g = lane / 4, t = lane % 4;
  uint32_t words[4], bits = 0;
  if (p.keys % 4 == 0) {
    // The four words of a counter belong to four keys in a row, which lie in two lanes (with KeyRows in four). Each
    // lane draws another of the counters that they share, and they exchange the bits.
    const int query = KeyRows ? column + 2 * t + g % 2 : row + g + t % 2 * 8;
    const int key = KeyRows ? row + g / 4 * 4 + g / 2 % 2 * 8 : column + t / 2 * 4;
    uint64_t number = ((plane * p.queries + query) * p.keys + key) / 4;
#pragma unroll 2
    for (int n = 0; n < NT; ++n, number += KeyRows ? 2 * p.keys : 2) {
      philox(p.seed, number, words);
#pragma unroll
      for (int e = 0; e < 4; ++e) bits |= static_cast<uint32_t>(words[e] <= p.last_dropped) << (4 * n + e);
    }
    if (KeyRows) return swap_bits<8, 2, 0x33333333u>(swap_bits<4, 1, 0x55555555u>(bits));
    return swap_bits<1, 2, 0x33333333u>(bits);
  }
#pragma unroll 1
  for (int i = 0; i < 4 * NT; ++i) {
    const int r = row + g + i / 2 % 2 * 8, c = column + i / 4 * 8 + 2 * t + i % 2;
    const uint64_t index = (plane * p.queries + (KeyRows ? c : r)) * p.keys + (KeyRows ? r : c);
    philox(p.seed, index / 4, words);
    bits |= static_cast<uint32_t>(philox_word(words, index) <= p.last_dropped) << i;
  }
  return bits;
}

// The same for each 16 of this warp's rows.
template <bool KeyRows, int NT, int MT>
__device__ __forceinline__ void draw(uint32_t (&bits)[MT], const Attention& p, int64_t plane, int row, int column) {
#pragma unroll
  for (int m = 0; m < MT; ++m) bits[m] = dropped<KeyRows, NT>(p, plane, row + 16 * m, column);
}

// Bits as `dropped` gives them, one number for each 16 rows; what they drop becomes zero.
template <int MT, int NT>
__device__ __forceinline__ void drop(float (&s)[MT][NT][4], const uint32_t (&bits)[MT]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (bits[m] >> (4 * n + e) & 1) s[m][n][e] = 0.0f;
      }
    }
  }
}

}  // namespace mlite
