// C interface of the fused attention (CUDA). Conventions: include/kernels.h.
//
// softmax(scale * Q K^T + mask) V for q [batch, heads, queries, head_dim] and k, v [batch, groups, keys, head_dim],
// with groups dividing heads (grouped-query attention: heads/groups consecutive heads share one group).
//  - dtype: MLITE_BF16 or MLITE_F16. float32 is refused (cudaErrorNotSupported): its callers have better kernels.
//  - head_dim: a multiple of 8, at most 256; the last dimension is contiguous.
//  - X_strides: three int64_t in host memory, elements between neighbours in batch, head (group for k and v) and
//    sequence; multiples of 8. Pointers are aligned to 16 bytes.
//  - causal: query i sees key j when j <= i + keys - queries, so that the last query sees the last key.
//  - segments_q [batch, queries] and segments_k [batch, keys], int32, contiguous: a query sees only the keys of its own
//    segment (document). Both nullptr: one document. Equal ids need not be neighbours.
//  - lse: float32 [batch, heads, queries], contiguous: logarithm of the sum of exponentials of the scaled scores;
//    -infinity where a query sees no key (its output is zero, and so are its gradients).
//  - scale > 0. Anything else that is not served returns cudaErrorInvalidValue, wrongly aligned pointers and strides
//    cudaErrorMisalignedAddress.
#pragma once
#include <cstdint>

extern "C" {
int mlite_cuda_attention_forward(int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys,
                                 int64_t head_dim, float scale, int causal,                       //
                                 const void* q, const int64_t* q_strides,                         //
                                 const void* k, const int64_t* k_strides,                         //
                                 const void* v, const int64_t* v_strides,                         //
                                 const int32_t* segments_q, const int32_t* segments_k,            //
                                 void* o, const int64_t* o_strides, float* lse, void* stream);

// Bytes that the backward pass needs in `workspace` (aligned to 16 bytes, contents without meaning).
int64_t mlite_cuda_attention_backward_workspace(int64_t batch, int64_t heads, int64_t queries);

// Gradients of q, k and v from the gradient of o (do_). Deterministic: no atomics. dk and dv are summed over the query
// heads of a group in float32 and rounded once.
int mlite_cuda_attention_backward(int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys,
                                  int64_t head_dim, float scale, int causal,                      //
                                  const void* q, const int64_t* q_strides,                        //
                                  const void* k, const int64_t* k_strides,                        //
                                  const void* v, const int64_t* v_strides,                        //
                                  const int32_t* segments_q, const int32_t* segments_k,           //
                                  const void* o, const int64_t* o_strides, const float* lse,      //
                                  const void* do_, const int64_t* do_strides,                     //
                                  void* dq, const int64_t* dq_strides,                            //
                                  void* dk, const int64_t* dk_strides,                            //
                                  void* dv, const int64_t* dv_strides,                            //
                                  void* workspace, void* stream);
}
