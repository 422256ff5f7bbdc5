// What every kernel here shares: launching, vector access, conversions, reductions. Compiled by nvcc, or as C++ for
// the host under csrc/emulator (MLITE_EMULATOR).
#pragma once

#ifdef MLITE_EMULATOR
#include "../emulator/emulator.h"
#define MLITE_SHARED_ARRAY(type, name, count) \
  static char name##_site;                     \
  type* const name = static_cast<type*>(::emulator::shared_array(&name##_site, sizeof(type) * (count)))
#define MLITE_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Shared memory: of fixed size, or the launch's dynamic bytes (128-byte aligned).
#define MLITE_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define MLITE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include <cstddef>
#include <cstdint>

#include "../include/kernels.h"

namespace mlite {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// kernel<<<grid, block, shared, stream>>>(args...); 0 or the cudaError_t. Dynamic shared memory may pass 48 KiB.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream, Arguments... arguments) {
#ifdef MLITE_EMULATOR
  (void)stream;
  return emulator::run_grid(grid, block, shared, [&] { kernel(arguments...); });
#else
  if (shared > (48 << 10)) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#endif
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiprocessors of the current device.
inline int multiprocessors() {
#ifdef MLITE_EMULATOR
  return emulator::kMultiprocessors;
#else
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
#endif
}

// As many blocks as there is work for, but no more than `per_multiprocessor` on each: they loop over the rest.
inline unsigned persistent_grid(int64_t blocks, int per_multiprocessor) {
  const int64_t most = int64_t(multiprocessors()) * per_multiprocessor;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half(x);
}

// exp and 1 / x for activations of type T: in 16 bits the fast ones' error (a few ulp of fp32) disappears in rounding.
template <typename T>
__device__ __forceinline__ float exp_for(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}
template <typename T>
__device__ __forceinline__ float reciprocal_for(float x) {
  return sizeof(T) == 4 ? 1.0f / x : __fdividef(1.0f, x);
}

// N neighbouring elements as they lie in memory, read and written in accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T v[N];
  __device__ __forceinline__ float operator[](int i) const { return to_float(v[i]); }
  __device__ __forceinline__ void set(int i, float x) { v[i] = from_float<T>(x); }
};

template <int bytes>
struct Access;  // the register type of one access
template <>
struct Access<2> {
  using type = uint16_t;
};
template <>
struct Access<4> {
  using type = unsigned;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<16> {
  using type = uint4;
};

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* pointer) {
  constexpr int kBytes = sizeof(T) * N, kAccess = kBytes < 16 ? kBytes : 16;
  using Register = typename Access<kAccess>::type;
#ifdef MLITE_EMULATOR
  emulator::require_aligned(pointer, kAccess);
#endif
  Register registers[kBytes / kAccess];
#pragma unroll
  for (int i = 0; i < kBytes / kAccess; ++i) registers[i] = reinterpret_cast<const Register*>(pointer)[i];
  Vector<T, N> result;
  memcpy(&result, registers, kBytes);
  return result;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* pointer, const Vector<T, N>& value) {
  constexpr int kBytes = sizeof(T) * N, kAccess = kBytes < 16 ? kBytes : 16;
  using Register = typename Access<kAccess>::type;
#ifdef MLITE_EMULATOR
  emulator::require_aligned(pointer, kAccess);
#endif
  Register registers[kBytes / kAccess];
  memcpy(registers, &value, kBytes);
#pragma unroll
  for (int i = 0; i < kBytes / kAccess; ++i) reinterpret_cast<Register*>(pointer)[i] = registers[i];
}

template <int N>
__device__ __forceinline__ void store_floats(float* pointer, const float (&values)[N]) {
  Vector<float, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.v[i] = values[i];
  store(pointer, vector);
}

// True if every pointer (null ones aside) can be accessed 16 bytes at a time.
template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Calls body with a null pointer of the element type of `dtype` for its type, or returns cudaErrorInvalidValue.
template <typename Body>
int dispatch(int dtype, Body body) {
  switch (dtype) {
    case MLITE_F32: return body(static_cast<float*>(nullptr));
    case MLITE_BF16: return body(static_cast<bf16*>(nullptr));
    case MLITE_F16: return body(static_cast<f16*>(nullptr));
  }
  return 1;
}

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The combination of all lanes' values, in every lane.
template <typename Operation, typename T>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value = operation(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

}  // namespace mlite
