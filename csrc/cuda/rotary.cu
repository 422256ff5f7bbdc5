// Rotary position embedding (Su et al. 2021), half-split, of q and k in one launch.
//
// One block a position of one batch entry. threadIdx.x owns kVector feature pairs, for which it reads cos and sin once,
// and threadIdx.y walks over the heads of q, then those of k.
// Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "common.cuh"

namespace mlite {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Heads {
  const T* in;
  T* out;
  int64_t in_b, in_s, in_h, out_b, out_s, out_h;  // strides per batch entry, position, head
  int heads;
};

template <typename T, int kVector>
__device__ __forceinline__ void turn(const T* in, T* out, int half, const float (&cos)[2][kVector],
                                     const float (&sin)[2][kVector]) {
  const Vector<T, kVector> first = load<kVector>(in), second = load<kVector>(in + half);
  Vector<T, kVector> first_out, second_out;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    first_out.set(i, first[i] * cos[0][i] - second[i] * sin[0][i]);
    second_out.set(i, second[i] * cos[1][i] + first[i] * sin[1][i]);
  }
  store(out, first_out);
  store(out + half, second_out);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(int64_t seq, int head_dim, int rotary_dim, Heads<T> q, Heads<T> k, const float* cos_table,
                  const float* sin_table, int64_t table_stride_b, bool inverse) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  const int half = rotary_dim / 2, passed = (head_dim - rotary_dim) / kVector;
  const float* const table_cos = cos_table + b * table_stride_b + s * rotary_dim;
  const float* const table_sin = sin_table + b * table_stride_b + s * rotary_dim;
  q.in += b * q.in_b + s * q.in_s;
  q.out += b * q.out_b + s * q.out_s;
  k.in += b * k.in_b + s * k.in_s;
  k.out += b * k.out_b + s * k.out_s;
  for (int col = threadIdx.x * kVector; col < half; col += blockDim.x * kVector) {
    float cos[2][kVector], sin[2][kVector];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      // The transposed map takes the other half's sine, negated.
      const Vector<float, kVector> c = load<kVector>(table_cos + part * half + col);
      const Vector<float, kVector> n = load<kVector>(table_sin + (inverse ? 1 - part : part) * half + col);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        cos[part][i] = c[i];
        sin[part][i] = inverse ? -n[i] : n[i];
      }
    }
    for (int head = threadIdx.y; head < q.heads; head += blockDim.y)
      turn(q.in + head * q.in_h + col, q.out + head * q.out_h + col, half, cos, sin);
    // Counting on where q's heads ended, so that nobody gets the longer share twice.
    for (int head = (threadIdx.y + blockDim.y - q.heads % blockDim.y) % blockDim.y; head < k.heads; head += blockDim.y)
      turn(k.in + head * k.in_h + col, k.out + head * k.out_h + col, half, cos, sin);
  }
  for (int item = threadIdx.y * blockDim.x + threadIdx.x; item < (q.heads + k.heads) * passed;
       item += blockDim.x * blockDim.y) {
    const int64_t head = item / passed, col = rotary_dim + item % passed * kVector;
    const bool of_q = head < q.heads;
    const T* const in = of_q ? q.in + head * q.in_h + col : k.in + (head - q.heads) * k.in_h + col;
    T* const out = of_q ? q.out + head * q.out_h + col : k.out + (head - q.heads) * k.out_h + col;
    if (in != out) store(out, load<kVector>(in));
  }
}

template <typename T, int kVector>
int run(int64_t batch, int64_t seq, int head_dim, int rotary_dim, Heads<T> q, Heads<T> k, const float* cos,
        const float* sin, int64_t cos_batch_stride, bool inverse, void* stream) {
  const int64_t pairs = divide_up(rotary_dim / 2, kVector), heads = q.heads + k.heads;
  const int64_t x = pairs < 1 ? 1 : pairs < kThreads ? pairs : kThreads;
  const int64_t walks = divide_up(heads, kThreads / x);  // of equal length
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(divide_up(heads, walks)));
  return launch(rotary_kernel<T, kVector>, dim3(static_cast<unsigned>(batch * seq)), block, 0, stream, seq, head_dim,
                rotary_dim, q, k, cos, sin, cos_batch_stride, inverse);
}

}  // namespace
}  // namespace mlite

using namespace mlite;

int mlite_cuda_rotary(int dtype, int64_t batch, int64_t seq, int64_t heads_q, int64_t heads_k, int64_t head_dim,
                      int64_t rotary_dim, const void* q, int64_t q_stride_b, int64_t q_stride_s, int64_t q_stride_h,
                      const void* k, int64_t k_stride_b, int64_t k_stride_s, int64_t k_stride_h, void* q_out,
                      int64_t q_out_stride_b, int64_t q_out_stride_s, int64_t q_out_stride_h, void* k_out,
                      int64_t k_out_stride_b, int64_t k_out_stride_s, int64_t k_out_stride_h, const float* cos,
                      const float* sin, int64_t cos_batch_stride, bool inverse, void* stream) {
  if (batch * seq * (heads_q + heads_k) == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const Heads<T> of_q{static_cast<const T*>(q), static_cast<T*>(q_out), q_stride_b,     q_stride_s,
                        q_stride_h,               q_out_stride_b,         q_out_stride_s, q_out_stride_h,
                        static_cast<int>(heads_q)};
    const Heads<T> of_k{static_cast<const T*>(k), static_cast<T*>(k_out), k_stride_b,     k_stride_s,
                        k_stride_h,               k_out_stride_b,         k_out_stride_s, k_out_stride_h,
                        static_cast<int>(heads_k)};
    const int64_t all = q_stride_b | q_stride_s | q_stride_h | k_stride_b | k_stride_s | k_stride_h | q_out_stride_b |
                        q_out_stride_s | q_out_stride_h | k_out_stride_b | k_out_stride_s | k_out_stride_h | head_dim |
                        rotary_dim / 2 | cos_batch_stride;
    const bool wide = all % kVector == 0 && aligned(q, k, q_out, k_out, cos, sin);
    return (wide ? run<T, kVector> : run<T, 1>)(batch, seq, static_cast<int>(head_dim), static_cast<int>(rotary_dim),
                                                of_q, of_k, cos, sin, cos_batch_stride, inverse, stream);
  });
}
