// The one C interface between Python and the kernels: raw pointers, sizes, and (CUDA) a stream handle. Attention's
// part is attention.h.
//
// Conventions
//  - Every function exists twice: mlite_cpu_NAME(...) and mlite_cuda_NAME(..., void* stream).
//  - `dtype` is that of activations and weights: MLITE_F32, MLITE_BF16, and on CUDA also MLITE_F16. Statistics
//    (means, sums, losses) and gradients of weights and biases are float32.
//  - Tensors are contiguous unless strides are passed. Strides are in elements. Pointers are aligned to their element;
//    16-byte alignment (of bases, row lengths and strides) is faster.
//  - Nothing is allocated; outputs and workspaces belong to the caller. A nullptr means "absent".
//  - Outputs may be inputs (in place) where an elementwise reading allows it: dx = dy, y = x.
//  - Returns 0, or on CUDA the cudaError_t of the launch. Arguments were checked by the caller (Python).
//  - NaN and inf in inputs go through to outputs as IEEE arithmetic has it. Zero rows are legal; gradients of weights
//    are then written as zeros.
#pragma once
#include <cstdint>

extern "C" {

enum MliteDtype { MLITE_F32 = 0, MLITE_BF16 = 1, MLITE_F16 = 2 };

#define MLITE_BOTH(name, ...)       \
  int mlite_cpu_##name(__VA_ARGS__); \
  int mlite_cuda_##name(__VA_ARGS__, void* stream)

// Gradients of weights and biases are summed in two steps without atomics, so that they repeat to the bit: up to
// `workspace_rows` partial sums of one row each in `workspace`, then their sum in order. Any count from 1 on is right,
// but the fewer, the longer are the sums in fp32; these give a good one. A workspace holds workspace_rows * width
// floats; the width stands with the function.
int64_t mlite_cpu_workspace_rows(int64_t rows, int64_t cols);
int64_t mlite_cuda_workspace_rows(int64_t rows, int64_t cols);

// LayerNorm (rms false) or RMSNorm over the columns of x, or of `sum` = x + residual, which is written in `dtype`
// where a residual is given; what is normalised is the rounded sum. y = (x - mean) * rstd * weight + bias, RMSNorm
// without mean and (usually) bias. mean (LayerNorm only) and rstd: f32 [rows], for the backward pass.
MLITE_BOTH(norm_forward, int dtype, bool rms, int64_t rows, int64_t cols, float eps, const void* x,
           const void* residual, const void* weight, const void* bias, void* y, void* sum, float* mean, float* rstd);

// x is what was normalised (`sum` where there was a residual). dsum, or null: gradient that reaches `sum` from the
// residual stream; dx, then the gradient of x and of the residual alike, includes it. dweight, dbias (or null): f32
// [cols]. Workspace width: cols, with dbias 2 * cols.
MLITE_BOTH(norm_backward, int dtype, bool rms, int64_t rows, int64_t cols, const void* dy, const void* dsum,
           const void* x, const void* weight, const float* mean, const float* rstd, void* dx, float* dweight,
           float* dbias, float* workspace, int64_t workspace_rows);

// y = gelu(x + bias), exact (erf) or its tanh approximation; bias [cols] or null. Workspace width (with dbias): cols.
MLITE_BOTH(bias_gelu_forward, int dtype, bool tanh, int64_t rows, int64_t cols, const void* x, const void* bias,
           void* y);
MLITE_BOTH(bias_gelu_backward, int dtype, bool tanh, int64_t rows, int64_t cols, const void* dy, const void* x,
           const void* bias, void* dx, float* dbias, float* workspace, int64_t workspace_rows);

// y = silu(gate) * up; x [rows, 2 * cols], gate then up, both after adding bias [2 * cols] or null; y [rows, cols].
// Workspace width (with dbias): 2 * cols.
MLITE_BOTH(swiglu_forward, int dtype, int64_t rows, int64_t cols, const void* x, const void* bias, void* y);
MLITE_BOTH(swiglu_backward, int dtype, int64_t rows, int64_t cols, const void* dy, const void* x, const void* bias,
           void* dx, float* dbias, float* workspace, int64_t workspace_rows);

// Rotary embedding of q and k in one pass, half-split: with h = rotary_dim / 2, features i and i + h of each head turn,
//   out[i] = x[i] cos[i] - x[i + h] sin[i],  out[i + h] = x[i + h] cos[i + h] + x[i] sin[i + h],
// and those from rotary_dim on pass. `inverse`: the transposed map, which is the gradient. cos, sin: f32 [seq,
// rotary_dim], moved on by cos_batch_stride per batch entry (0: shared). Strides per batch entry, position and head;
// features are contiguous. Outputs may be the inputs, with the same strides. heads_k may be 0.
MLITE_BOTH(rotary, int dtype, int64_t batch, int64_t seq, int64_t heads_q, int64_t heads_k, int64_t head_dim,
           int64_t rotary_dim, const void* q, int64_t q_stride_b, int64_t q_stride_s, int64_t q_stride_h, const void* k,
           int64_t k_stride_b, int64_t k_stride_s, int64_t k_stride_h, void* q_out, int64_t q_out_stride_b,
           int64_t q_out_stride_s, int64_t q_out_stride_h, void* k_out, int64_t k_out_stride_b, int64_t k_out_stride_s,
           int64_t k_out_stride_h, const float* cos, const float* sin, int64_t cos_batch_stride, bool inverse);

// y = softmax(scale * x) over the keys a query may see, 0 elsewhere, and all 0 where it may see none; x, y [batch,
// heads, queries, keys]. A key counts if mask (uint8, or null) is not 0, and segments_q[b, query] == segments_k[b, key]
// (int32, or both null), and, causal, key - keys <= query - queries (the last query sees the last key). mask strides:
// batch, head (0: one for all heads), query, key.
MLITE_BOTH(softmax_forward, int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, float scale,
           const void* x, const uint8_t* mask, int64_t mask_stride_b, int64_t mask_stride_h, int64_t mask_stride_q,
           int64_t mask_stride_k, const int32_t* segments_q, const int32_t* segments_k, bool causal, void* y);
// dx = scale * y * (dy - sum(dy * y)), each row of `keys`.
MLITE_BOTH(softmax_backward, int dtype, int64_t rows, int64_t keys, float scale, const void* dy, const void* y,
           void* dx);

// Cross entropy over [rows, cols] logits of which the first `valid` columns are tokens start, start + 1, ... and the
// rest padding that takes no part. Per row, of this slice: max, sum of exp(x - max), and the label's logit (0 where the
// label, int64, is not in this slice). With valid 0, or nothing but -inf: max -inf, sum 0. Slices are combined by the
// caller.
MLITE_BOTH(cross_entropy_stats, int dtype, int64_t rows, int64_t cols, int64_t valid, int64_t start, const void* logits,
           const int64_t* labels, float* max, float* sum, float* label_logit);
// Overwrites the logits by the gradient of sum over rows of grad * (lse - label logit + z_loss * lse^2), where
// lse = max + log(sum), max and sum being those of the whole vocabulary; 0 in the padding.
MLITE_BOTH(cross_entropy_grad, int dtype, int64_t rows, int64_t cols, int64_t valid, int64_t start, void* logits,
           const int64_t* labels, const float* max, const float* sum, const float* grad, float z_loss);

// y = x * factor, elementwise, with factor 0 in a share p of places and 1 / (1 - p) elsewhere (p = 1: 0). Which, is a
// function of the seed and of the element's global index alone, so that any slice draws what the whole would: element
// (r, c) of these [rows, cols] has index i = offset + r * row_stride + c, and is dropped where word i % 4 of
// Philox4x32-10 (Salmon et al. 2011), counter (low and high half of i / 4, 0, 0), key (low and high half of seed), is
// below min(p * 2^32 rounded down, 2^32). The gradient is the same function of dy.
MLITE_BOTH(dropout, int dtype, int64_t rows, int64_t cols, int64_t row_stride, uint64_t offset, double p, uint64_t seed,
           const void* x, void* y);

#undef MLITE_BOTH
}
