// Bias + GELU (Hendrycks and Gimpel 2016), exact and by tanh, and bias + SwiGLU (Shazeer 2020), forward and backward.
#include "common.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr float kRootTwoOverPi = 0.79788456080286536f, kInverseRootTwoPi = 0.39894228040143268f, kCubic = 0.044715f;

MLITE_INLINE inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// The normal distribution at x: its density phi, and its integral Phi up to x. Phi(-|x|) = exp(-x^2 / 2) p(t) with
// t = 1 / (1 + k |x|), the form of Abramowitz and Stegun 7.1.26, with k and p fitted anew for fp32; it keeps relative
// accuracy in the tail, where 1 + erf would cancel.
struct Normal {
  Floats phi, Phi;
};
MLITE_INLINE inline Normal normal(Floats x) {
  const Floats size = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.34f * size), e = exp(-0.5f * x * x);
  const Floats t2 = t * t, t4 = t2 * t2;
  const Floats p01 = 0.136138558f * t + 0.135619208f, p23 = 0.116363548f * t + 0.114976414f;
  const Floats p45 = 0.206608117f * t + -0.0474206991f, p67 = 0.141812518f * t + -0.277456552f;
  const Floats p = (-0.0266411267f * t4 + (p67 * t2 + p45)) * t4 + (p23 * t2 + p01);
  const Floats tail = e * (p * t);
  return {e * kInverseRootTwoPi, x < 0.0f ? tail : 1.0f - tail};
}

// By tanh, GELU is x sigmoid(2u): 0.5 x (1 + tanh u) without its cancellation.
template <bool kTanh>
MLITE_INLINE inline Floats gelu(Floats x) {
  if (kTanh) return x * sigmoid(2.0f * kRootTwoOverPi * (x + kCubic * x * x * x));
  return x * normal(x).Phi;
}

template <bool kTanh>
MLITE_INLINE inline Floats gelu_slope(Floats x) {
  if (!kTanh) {
    const Normal at = normal(x);
    return at.Phi + x * at.phi;
  }
  const Floats e = exp(-2.0f * kRootTwoOverPi * (x + kCubic * x * x * x)), s = 1.0f / (1.0f + e);
  const Floats rest = e < 1.0f ? e * s : 1.0f - s;  // 1 - s, which would cancel where s nears 1
  return s + x * s * rest * (2.0f * kRootTwoOverPi) * (1.0f + 3.0f * kCubic * x * x);
}

template <typename T>
MLITE_INLINE inline Floats biased(const T* x, const T* bias, int64_t i, int count) {
  const Floats v = load(x + i, count);
  return bias ? v + load(bias + i, count) : v;
}

MLITE_INLINE inline void add_to(float* sums, Floats x, int count) { store(sums, load(sums, count) + x, count); }

template <bool kTanh, typename T>
void gelu_row(int64_t cols, const T* x, const T* bias, T* y) {
  for_vectors(cols, [&](int64_t i, int count, int) MLITE_INLINE {
    store(y + i, gelu<kTanh>(biased(x, bias, i, count)), count);
  });
}

// partial, or null: sums for the bias.
template <bool kTanh, typename T>
void gelu_backward_row(int64_t cols, const T* dy, const T* x, const T* bias, T* dx, float* partial) {
  for_vectors(cols, [&](int64_t i, int count, int) MLITE_INLINE {
    const Floats d = load(dy + i, count) * gelu_slope<kTanh>(biased(x, bias, i, count));
    store(dx + i, d, count);
    if (partial) add_to(partial + i, d, count);
  });
}

// kStreams: the results are streamed.
template <bool kStreams, typename T>
MLITE_INLINE inline void put(T* p, Floats x, int count) {
  if (kStreams) stream(p, x);
  else store(p, x, count);
}

template <bool kStreams, typename T>
void swiglu_row(int64_t cols, const T* x, const T* bias, T* y) {
  const T *const up_in = x + cols, *const up_bias = bias ? bias + cols : nullptr;
  for_vectors(cols, [&](int64_t i, int count, int) MLITE_INLINE {
    const Floats gate = biased(x, bias, i, count), up = biased(up_in, up_bias, i, count);
    put<kStreams>(y + i, gate * sigmoid(gate) * up, count);
  });
  if (kStreams) finish_streams();
}

template <bool kStreams, typename T>
void swiglu_backward_row(int64_t cols, const T* dy, const T* x, const T* bias, T* dx, float* partial) {
  const T *const up_in = x + cols, *const up_bias = bias ? bias + cols : nullptr;
  for_vectors(cols, [&](int64_t i, int count, int) MLITE_INLINE {
    const Floats gate = biased(x, bias, i, count), up = biased(up_in, up_bias, i, count), d = load(dy + i, count);
    const Floats s = sigmoid(gate), silu = gate * s;
    const Floats d_gate = d * up * (s + silu * (1.0f - s)), d_up = d * silu;
    put<kStreams>(dx + i, d_gate, count);
    put<kStreams>(dx + cols + i, d_up, count);
    if (!partial) return;
    add_to(partial + i, d_gate, count);
    add_to(partial + cols + i, d_up, count);
  });
  if (kStreams) finish_streams();
}

// run(row, partial): over blocks of rows where the bias' gradient is wanted, else over rows with a null pointer.
template <typename Run>
void backward(int64_t rows, int64_t width, float* dbias, float* workspace, int64_t workspace_rows, const Run& run) {
  if (!dbias) return for_rows(rows, width, [&](int64_t row) { run(row, nullptr); });
  sum_over_rows(rows, width, width, workspace, workspace_rows, dbias, nullptr,
                [&](float* partial, int64_t row) { run(row, partial); });
}

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(bias_gelu_forward)(int dtype, bool tanh, int64_t rows, int64_t cols, const void* x, const void* bias,
                                 void* y) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = tanh ? gelu_row<true, T> : gelu_row<false, T>;
    for_rows(rows, cols, [&](int64_t row) {
      run(cols, static_cast<const T*>(x) + row * cols, static_cast<const T*>(bias), static_cast<T*>(y) + row * cols);
    });
  });
}

int MLITE_CPU(bias_gelu_backward)(int dtype, bool tanh, int64_t rows, int64_t cols, const void* dy, const void* x,
                                  const void* bias, void* dx, float* dbias, float* workspace, int64_t workspace_rows) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = tanh ? gelu_backward_row<true, T> : gelu_backward_row<false, T>;
    backward(rows, cols, dbias, workspace, workspace_rows, [&](int64_t row, float* partial) {
      run(cols, static_cast<const T*>(dy) + row * cols, static_cast<const T*>(x) + row * cols,
          static_cast<const T*>(bias), static_cast<T*>(dx) + row * cols, partial);
    });
  });
}

int MLITE_CPU(swiglu_forward)(int dtype, int64_t rows, int64_t cols, const void* x, const void* bias, void* y) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = streams(static_cast<T*>(y), rows, cols) ? swiglu_row<true, T> : swiglu_row<false, T>;
    for_rows(rows, 2 * cols, [&](int64_t row) {
      run(cols, static_cast<const T*>(x) + 2 * row * cols, static_cast<const T*>(bias), static_cast<T*>(y) + row * cols);
    });
  });
}

int MLITE_CPU(swiglu_backward)(int dtype, int64_t rows, int64_t cols, const void* dy, const void* x, const void* bias,
                               void* dx, float* dbias, float* workspace, int64_t workspace_rows) {
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = streams(static_cast<T*>(dx), rows, cols) ? swiglu_backward_row<true, T>
                                                              : swiglu_backward_row<false, T>;
    backward(rows, 2 * cols, dbias, workspace, workspace_rows, [&](int64_t row, float* partial) {
      run(cols, static_cast<const T*>(dy) + row * cols, static_cast<const T*>(x) + 2 * row * cols,
                          static_cast<const T*>(bias), static_cast<T*>(dx) + 2 * row * cols, partial);
    });
  });
}
