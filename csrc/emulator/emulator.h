// The CUDA of csrc/cuda as plain C++ for the host: `g++ -DMLITE_EMULATOR -x c++ kernel.cu fibres.cpp`. Tests only.
//
// One block runs at a time, on one thread of the host; every CUDA thread is a fibre that runs until it meets a block
// barrier, a warp collective or its end, so nothing that the code does not synchronise happens to be in step:
//  - schedule 0 (plain): ready fibres in turn, blocks in order;
//  - schedule 1 (adversarial): the last warp as far ahead as it can come, lanes and blocks last to first;
//  - schedule n > 1 (adversarial): warps, lanes and blocks shuffled with seed n, anew after every block barrier; the
//    first warp of the shuffle runs as far ahead as it can come.
// A read before the write it depends on, or a write before the last read, shows under one of these orders: shared
// memory is filled with 0xff (NaN as fp32, bf16 and fp16) before each block. What the order alone cannot show is
// reported as an error of the launch: a barrier or collective that can never complete, lanes of one warp in different
// collectives, a lane outside its own mask or gone, a misaligned vector access, too much shared memory.
// It knows nothing of caches, memory ordering within a fibre's run, or time.
//
// To add a warp-wide instruction (mma, ldmatrix): give `warp_collective` a record on the caller's stack and a function
// that computes all lanes' results once every lane has arrived. To add per-thread state (cp.async queues): index
// by `thread_rank()` and drop what is older than `block_serial()`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMultiprocessors = 2;  // few, so that small grids already loop
constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719;  // the cudaError_t of the same names

extern uint3 thread_index, block_index;  // of the running fibre
extern dim3 block_size, grid_size;

// Runs `body` once per thread of the grid; 0 or one of the errors above, `mlite_emulator_error` has the words.
int run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// The first `bytes` of shared memory site `site` of the running block; 128-byte aligned, 0xff at the block's start.
void* shared_array(const void* site, size_t bytes);
unsigned char* dynamic_shared();

void block_barrier();

// Waits for every lane of `mask`, all of which must come with the same `combine`; then combine(records) runs once,
// where records[lane] is what that lane passed (null outside the mask) and stays valid until the lanes go on.
void warp_collective(uint32_t mask, void* record, void (*combine)(void* const* records));

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned thread_rank();   // within the block, x fastest
uint64_t block_serial();  // another number for every block ever run

inline void require_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("a %zu-byte access at %p is not aligned", bytes, pointer);
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T, Shuffle kind>
T shuffle(uint32_t mask, T value, int argument, int width) {
  struct Record {
    T value, result;
    int argument, width;
  } mine{value, value, argument, width};
  if (width <= 0 || width > kWarp || (width & (width - 1))) fail("a shuffle is %d lanes wide", width);
  warp_collective(mask, &mine, [](void* const* records) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!records[lane]) continue;
      Record& record = *static_cast<Record*>(records[lane]);
      const int first = lane & ~(record.width - 1);
      int source = lane;
      if (kind == Shuffle::kIndex) source = first + (record.argument & (record.width - 1));
      if (kind == Shuffle::kUp) source = lane - record.argument;
      if (kind == Shuffle::kDown) source = lane + record.argument;
      if (kind == Shuffle::kXor) source = lane ^ record.argument;
      if (kind == Shuffle::kUp ? source < first : source >= first + record.width) source = lane;
      if (!records[source]) fail("lane %d shuffles from lane %d, which is not in the mask", lane, source);
      record.result = static_cast<Record*>(records[source])->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(uint32_t mask, bool predicate) {
  struct Record {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  warp_collective(mask, &mine, [](void* const* records) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (records[lane] && static_cast<Record*>(records[lane])->predicate) bits |= 1u << lane;
    for (int lane = 0; lane < kWarp; ++lane)
      if (records[lane]) static_cast<Record*>(records[lane])->result = bits;
  });
  return mine.result;
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  char record;
  emulator::warp_collective(mask, &record, [](void* const*) {});
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = emulator::kWarp) {
  return emulator::shuffle<T, emulator::Shuffle::kIndex>(mask, value, lane, width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = emulator::kWarp) {
  return emulator::shuffle<T, emulator::Shuffle::kUp>(mask, value, delta, width);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = emulator::kWarp) {
  return emulator::shuffle<T, emulator::Shuffle::kDown>(mask, value, delta, width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = emulator::kWarp) {
  return emulator::shuffle<T, emulator::Shuffle::kXor>(mask, value, lanes, width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate != 0); }
inline int __any_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate == 0) == 0; }

template <bool kMax>
int reduce(uint32_t mask, int value) {
  struct Record {
    int value, result;
  } mine{value, 0};
  emulator::warp_collective(mask, &mine, [](void* const* records) {
    int result = kMax ? INT32_MIN : INT32_MAX;
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      if (!records[lane]) continue;
      const int other = static_cast<Record*>(records[lane])->value;
      result = kMax ? std::max(result, other) : std::min(result, other);
    }
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      if (records[lane]) static_cast<Record*>(records[lane])->result = result;
  });
  return mine.result;
}
inline int __reduce_min_sync(uint32_t mask, int value) { return reduce<false>(mask, value); }
inline int __reduce_max_sync(uint32_t mask, int value) { return reduce<true>(mask, value); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

// bf16 and fp16: conversions round to nearest even, as the hardware's.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return emulator::bits_to_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = emulator::float_to_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}
inline __half __float2half(float x) {
  const uint16_t sign = emulator::float_to_bits(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // In units of the last place at this size (never below the smallest subnormal), rounded by the host's own mode;
  // a carry out of the fraction lands in the exponent, where it belongs.
  const int exponent = size < 0x1p-14f ? -24 : std::ilogb(size) - 10;
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, -exponent)));
  return {static_cast<uint16_t>(sign | (units + ((exponent + 24) << 10)))};
}

// The fast intrinsics are as exact here as the plain functions.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t(a) * b) >> 32); }
inline uint32_t __float_as_uint(float x) { return emulator::float_to_bits(x); }
inline float __uint_as_float(uint32_t x) { return emulator::bits_to_float(x); }
using std::max;
using std::min;
