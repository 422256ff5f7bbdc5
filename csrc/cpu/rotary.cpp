// Rotary position embedding (Su et al. 2021), half-split, of q and k in one pass.
#include "common.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

template <typename T>
void turn(int64_t heads, int64_t head_dim, int64_t rotary_dim, const T* in, int64_t in_h, T* out, int64_t out_h,
          const float* cos, const float* sin, bool inverse) {
  const int64_t half = rotary_dim / 2;
  // The transposed map takes the other half's sine, negated.
  const float *const sin_first = inverse ? sin + half : sin, *const sin_second = inverse ? sin : sin + half;
  const float sign = inverse ? -1.0f : 1.0f;
  for (int64_t head = 0; head < heads; ++head, in += in_h, out += out_h) {
    for_vectors(half, [&](int64_t i, int count, int) MLITE_INLINE {
      const Floats first = load(in + i, count), second = load(in + half + i, count);
      const Floats sine = sign * load(sin_first + i, count), other_sine = sign * load(sin_second + i, count);
      store(out + i, first * load(cos + i, count) - second * sine, count);
      store(out + half + i, second * load(cos + half + i, count) + first * other_sine, count);
    });
    if (in != out) memcpy(out + rotary_dim, in + rotary_dim, sizeof(T) * (head_dim - rotary_dim));
  }
}

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(rotary)(int dtype, int64_t batch, int64_t seq, int64_t heads_q, int64_t heads_k, int64_t head_dim,
                      int64_t rotary_dim, const void* q, int64_t q_stride_b, int64_t q_stride_s, int64_t q_stride_h,
                      const void* k, int64_t k_stride_b, int64_t k_stride_s, int64_t k_stride_h, void* q_out,
                      int64_t q_out_stride_b, int64_t q_out_stride_s, int64_t q_out_stride_h, void* k_out,
                      int64_t k_out_stride_b, int64_t k_out_stride_s, int64_t k_out_stride_h, const float* cos,
                      const float* sin, int64_t cos_batch_stride, bool inverse) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(batch * seq, (heads_q + heads_k) * head_dim, [&](int64_t row) {
      const int64_t b = row / seq, s = row % seq, table = b * cos_batch_stride + s * rotary_dim;
      turn(heads_q, head_dim, rotary_dim, static_cast<const T*>(q) + b * q_stride_b + s * q_stride_s, q_stride_h,
           static_cast<T*>(q_out) + b * q_out_stride_b + s * q_out_stride_s, q_out_stride_h, cos + table, sin + table,
           inverse);
      if (heads_k == 0) return;
      turn(heads_k, head_dim, rotary_dim, static_cast<const T*>(k) + b * k_stride_b + s * k_stride_s, k_stride_h,
           static_cast<T*>(k_out) + b * k_out_stride_b + s * k_out_stride_s, k_out_stride_h, cos + table, sin + table,
           inverse);
    });
  });
}
