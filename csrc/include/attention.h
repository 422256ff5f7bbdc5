// C interface of the fused attention. Conventions: kernels.h.
//
// softmax(scale * Q K^T + mask) V for q [batch, heads, queries, head_dim] and k, v [batch, groups, keys, head_dim],
// groups dividing heads (grouped-query attention: heads/groups consecutive heads share one group).
//  - head_dim: at most 256; the last dimension is contiguous.
//  - X_strides: three int64_t in host memory, elements between neighbours in batch, head (of k and v: group) and
//    sequence.
//  - causal: query i sees key j when j <= i + keys - queries, so that the last query sees the last key.
//  - segments_q [batch, queries], segments_k [batch, keys]: int32, contiguous; a query sees only the keys of its own
//    segment (document). Both nullptr: one document. Equal ids need not be neighbours.
//  - dropout_p: share of the probabilities dropped, the rest scaled by 1 / (1 - p); 0: none. Probability (b, h, i, j) has
//    the global index ((b * dropout_heads + dropout_head + h) * queries + i) * keys + j and is dropped where `dropout` of
//    kernels.h, with that index and dropout_seed, would drop it: so a slice of the heads draws what all of them would.
//  - lse: float32 [batch, heads, queries], contiguous: logarithm of the sum of exponentials of the scaled scores;
//    -infinity where a query sees no key (its output is zero, and so is its gradient).
//  - CUDA serves MLITE_BF16 and MLITE_F16 on tensor cores; head_dim and strides are multiples of 8, pointers aligned to
//    16 bytes, scale > 0. It returns cudaErrorNotSupported for MLITE_F32, cudaErrorMisalignedAddress for pointers and
//    strides, cudaErrorInvalidValue for the rest, and writes nothing then.
#pragma once
#include "kernels.h"

#define MLITE_BOTH(name, ...)        \
  int mlite_cpu_##name(__VA_ARGS__); \
  int mlite_cuda_##name(__VA_ARGS__, void* stream)

extern "C" {

MLITE_BOTH(attention_forward, int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys,
           int64_t head_dim, float scale, bool causal, const void* q, const int64_t* q_strides, const void* k,
           const int64_t* k_strides, const void* v, const int64_t* v_strides, const int32_t* segments_q,
           const int32_t* segments_k, double dropout_p, uint64_t dropout_seed, int64_t dropout_head, int64_t dropout_heads,
           void* o, const int64_t* o_strides, float* lse);

// Bytes that the backward pass needs in `workspace` (aligned to 16 bytes; what it holds does not matter).
int64_t mlite_cpu_attention_workspace(int64_t batch, int64_t heads, int64_t queries, int64_t head_dim);
int64_t mlite_cuda_attention_workspace(int64_t batch, int64_t heads, int64_t queries, int64_t head_dim);

// Gradients of q, k and v from that of o (do_). Repeats to the bit: no atomics. dk and dv are summed over the query
// heads of a group in float32 and rounded once. All of dq, dk and dv is written.
MLITE_BOTH(attention_backward, int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys,
           int64_t head_dim, float scale, bool causal, const void* q, const int64_t* q_strides, const void* k,
           const int64_t* k_strides, const void* v, const int64_t* v_strides, const int32_t* segments_q,
           const int32_t* segments_k, double dropout_p, uint64_t dropout_seed, int64_t dropout_head,
           int64_t dropout_heads, const void* o, const int64_t* o_strides, const float* lse, const void* do_,
           const int64_t* do_strides, void* dq, const int64_t* dq_strides, void* dk, const int64_t* dk_strides, void* dv,
           const int64_t* dv_strides, void* workspace);
}

#undef MLITE_BOTH
