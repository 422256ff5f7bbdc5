// Scaled softmax over the keys that a query may see: causal, by a mask, within a document, or any of these together.
//
// A row is read once and stays in registers; keys beyond the causal limit are not read at all.
// Never yet run on a GPU: checked by the emulator's schedules and by nvcc's compilation alone.
#include "rows.cuh"

namespace mlite {
namespace {

struct Visibility {
  const uint8_t* mask;
  int64_t mask_b, mask_h, mask_q, mask_k;
  const int32_t *segments_q, *segments_k;
  bool causal;
};

template <typename T, int kVector>
struct Scores {
  Vector<T, kVector> x;
  unsigned visible;  // bit i: key i of the vector counts
};

template <typename T, int kVector, int kPer>
__global__ void __launch_bounds__(kMaxGroup) softmax_forward_kernel(int64_t rows, int64_t heads, int64_t queries,
                                                                    int keys, float scale, const T* x, Visibility see,
                                                                    T* y) {
  using S = Scores<T, kVector>;
  int phase = 0;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t query = row % queries, head = row / queries % heads, b = row / queries / heads;
    const int64_t limit = see.causal ? query + keys - queries + 1 : keys;  // keys before it
    const uint8_t* const mask = see.mask ? see.mask + b * see.mask_b + head * see.mask_h + query * see.mask_q : nullptr;
    const int32_t* const segments = see.segments_k ? see.segments_k + b * keys : nullptr;
    const int32_t segment = segments ? see.segments_q[b * queries + query] : 0;
    const auto read = [&](S& scores, int key) {
      scores.visible = 0;
      if (key >= limit) return;
      scores.x = load<kVector>(x + row * keys + key);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool counts = key + i < limit && (!mask || mask[(key + i) * see.mask_k]) &&
                            (!segments || segments[key + i] == segment);
        scores.visible |= unsigned(counts) << i;
      }
    };
    S cache[kPer];
    float largest[1] = {-INFINITY}, sum[1] = {0};
    read_row<kVector>(cache, keys, read, [&](const S& scores, int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (scores.visible >> i & 1) largest[0] = fmaxf(largest[0], scores.x[i] * scale);
    });
    group_reduce(largest, phase, Largest());
    visit_row<kVector>(cache, keys, read, [&](const S& scores, int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (scores.visible >> i & 1) sum[0] += exp_for<T>(scores.x[i] * scale - largest[0]);
    });
    group_reduce(sum, phase, Add());
    const float inverse = 1.0f / sum[0];  // unused where no key counts; else the largest alone makes it 1
    visit_row<kVector>(cache, keys, read, [&](const S& scores, int key) {
      Vector<T, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        out.set(i, scores.visible >> i & 1 ? exp_for<T>(scores.x[i] * scale - largest[0]) * inverse : 0.0f);
      store(y + row * keys + key, out);
    });
  }
}

template <typename T, int kVector>
struct Gradients {
  Vector<T, kVector> dy, y;
};

template <typename T, int kVector, int kPer>
__global__ void __launch_bounds__(kMaxGroup)
    softmax_backward_kernel(int64_t rows, int keys, float scale, const T* dy, const T* y, T* dx) {
  using G = Gradients<T, kVector>;
  int phase = 0;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const auto read = [&](G& both, int key) {
      both.dy = load<kVector>(dy + row * keys + key);
      both.y = load<kVector>(y + row * keys + key);
    };
    G cache[kPer];
    float dot[1] = {0};
    read_row<kVector>(cache, keys, read, [&](const G& both, int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) dot[0] += both.dy[i] * both.y[i];
    });
    group_reduce(dot, phase, Add());
    visit_row<kVector>(cache, keys, read, [&](const G& both, int key) {
      Vector<T, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) out.set(i, scale * both.y[i] * (both.dy[i] - dot[0]));
      store(dx + row * keys + key, out);
    });
  }
}

template <typename T, int kVector>
int forward(int64_t rows, int64_t heads, int64_t queries, int64_t keys, float scale, const void* x, Visibility see,
            void* y, void* stream) {
  constexpr int kPer = kVector == 1 ? 8 : 32 / kVector;
  const RowShape shape = row_shape(rows, divide_up(keys, kVector), kPer, rows);
  return launch(softmax_forward_kernel<T, kVector, kPer>, shape.grid, shape.block, 0, stream, rows, heads, queries,
                static_cast<int>(keys), scale, static_cast<const T*>(x), see, static_cast<T*>(y));
}

template <typename T, int kVector>
int backward(int64_t rows, int64_t keys, float scale, const void* dy, const void* y, void* dx, void* stream) {
  constexpr int kPer = kVector == 1 ? 8 : 32 / kVector;
  const RowShape shape = row_shape(rows, divide_up(keys, kVector), kPer, rows);
  return launch(softmax_backward_kernel<T, kVector, kPer>, shape.grid, shape.block, 0, stream, rows,
                static_cast<int>(keys), scale, static_cast<const T*>(dy), static_cast<const T*>(y),
                static_cast<T*>(dx));
}

}  // namespace
}  // namespace mlite

using namespace mlite;

int mlite_cuda_softmax_forward(int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, float scale,
                               const void* x, const uint8_t* mask, int64_t mask_stride_b, int64_t mask_stride_h,
                               int64_t mask_stride_q, int64_t mask_stride_k, const int32_t* segments_q,
                               const int32_t* segments_k, bool causal, void* y, void* stream) {
  const int64_t rows = batch * heads * queries;
  if (rows == 0 || keys == 0) return 0;
  const Visibility see{mask,          mask_stride_b, mask_stride_h, mask_stride_q,
                       mask_stride_k, segments_q,    segments_k,    causal};
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const auto run = keys % kVector == 0 && aligned(x, y) ? forward<T, kVector> : forward<T, 1>;
    return run(rows, heads, queries, keys, scale, x, see, y, stream);
  });
}

int mlite_cuda_softmax_backward(int dtype, int64_t rows, int64_t keys, float scale, const void* dy, const void* y,
                                void* dx, void* stream) {
  if (rows == 0 || keys == 0) return 0;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const auto run = keys % kVector == 0 && aligned(dy, y, dx) ? backward<T, kVector> : backward<T, 1>;
    return run(rows, keys, scale, dy, y, dx, stream);
  });
}
