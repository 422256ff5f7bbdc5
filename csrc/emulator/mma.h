// Tensor-core and asynchronous-copy instructions of cuda/mma.cuh on the emulator. Tests only.
//
// mma.m16n8k16 and ldmatrix follow the fragment layouts of the PTX ISA to the lane and register; products are
// summed in fp32. An asynchronous copy lands at one of the two extremes of what the hardware may do, chosen
// copy by copy: at once (so that one overwriting what others still read shows), or only when this thread
// waits for its group (so that a wait for too little shows).
#pragma once
#include <deque>
#include <vector>

#include "emulator.h"

namespace mlite {

// ---- asynchronous copies
// -----------------------------------------------------------------------------------------

struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid;

  void land() const {
    if (valid)
      std::memcpy(shared, global, 16);
    else
      std::memset(shared, 0, 16);
  }
};

struct AsyncCopies {  // of one thread
  uint64_t block = 0;
  std::vector<AsyncCopy> open;                // not yet in a group
  std::deque<std::vector<AsyncCopy>> groups;  // oldest first
};

inline AsyncCopies& async_copies() {
  static std::vector<AsyncCopies> all(1024);
  AsyncCopies& mine = all[emulator::thread_rank()];
  if (mine.block != emulator::block_serial()) mine = {emulator::block_serial(), {}, {}};
  return mine;
}

inline bool lands_at_once() {
  static uint32_t draws = 0;
  return ((++draws * 2654435761u) ^ static_cast<uint32_t>(emulator::block_serial())) >> 16 & 1;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  emulator::require_aligned(shared, 16);
  emulator::require_aligned(global, 16);
  const AsyncCopy copy = {shared, global, valid};
  if (lands_at_once())
    copy.land();
  else
    async_copies().open.push_back(copy);
}

inline void copy_async_commit() {
  AsyncCopies& mine = async_copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int Pending>
void copy_async_wait() {
  AsyncCopies& mine = async_copies();
  for (; mine.groups.size() > Pending; mine.groups.pop_front())
    for (const AsyncCopy& copy : mine.groups.front()) copy.land();
}

// ---- matrices
// ----------------------------------------------------------------------------------------------------

template <bool transposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  struct Record {
    const void* row;
    uint32_t* r;
  } mine = {row, r};
  emulator::require_aligned(row, 16);
  emulator::warp_collective(0xffffffffu, &mine, [](void* const* records) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t value[8][8];
      int banks = 0;
      for (int i = 0; i < 8; ++i)
        banks |= 1 << (reinterpret_cast<uintptr_t>(static_cast<const Record*>(records[8 * matrix + i])->row) / 16 % 8);
      if (banks != 0xff) emulator::fail("ldmatrix: rows of matrix %d lie in the same banks", matrix);
      for (int i = 0; i < 8; ++i)
        std::memcpy(value[i], static_cast<const Record*>(records[8 * matrix + i])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = transposed ? value[t][g] : value[g][t],
                       high = transposed ? value[t + 1][g] : value[g][t + 1];
        static_cast<const Record*>(records[lane])->r[matrix] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix(uint32_t (&r)[4], const void* row) { load_matrices<false>(r, row); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) { load_matrices<true>(r, row); }

// c += a b on one warp; `Element` turns 16 bits into a float.
template <class Element>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Record {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine = {c, a, {b0, b1}};
  emulator::warp_collective(0xffffffffu, &mine, [](void* const* records) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Record& record = *static_cast<const Record*>(records[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][t + i / 2 * 8] = Element::low(record.a[i]);
        a[g + i % 2 * 8][t + i / 2 * 8 + 1] = Element::high(record.a[i]);
        c[g + i / 2 * 8][t + i % 2] = record.c[i];
      }
      for (int i = 0; i < 2; ++i) {
        b[t + 8 * i][g] = Element::low(record.b[i]);
        b[t + 8 * i + 1][g] = Element::high(record.b[i]);
      }
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<const Record*>(records[lane])->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

inline int here(int x) { return x; }
inline float exp2_approx(float x) { return std::exp2(x); }

struct Bf16 {
  static uint32_t pack(float low, float high) {
    return __float2bfloat16(low).bits | uint32_t(__float2bfloat16(high).bits) << 16;
  }
  static float low(uint32_t pair) { return emulator::bits_to_float(pair << 16); }
  static float high(uint32_t pair) { return emulator::bits_to_float(pair & 0xffff0000u); }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_accumulate<Bf16>(c, a, b0, b1);
  }
};

struct Fp16 {
  static uint32_t pack(float low, float high) {
    return __float2half(low).bits | uint32_t(__float2half(high).bits) << 16;
  }
  static float low(uint32_t pair) { return table()[pair & 0xffff]; }
  static float high(uint32_t pair) { return table()[pair >> 16]; }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_accumulate<Fp16>(c, a, b0, b1);
  }

 private:
  static const std::vector<float>& table() {
    static const std::vector<float> values = [] {
      std::vector<float> result(65536);
      for (uint32_t bits = 0; bits < 65536; ++bits)
        result[bits] = __half2float({static_cast<uint16_t>(bits)});
      return result;
    }();
    return values;
  }
};

}  // namespace mlite
