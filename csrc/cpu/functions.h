// The functions of csrc/include that csrc/cpu compiles once per instruction set.
#pragma once
#include "../include/attention.h"
#include "../include/kernels.h"

#define MLITE_CPU_FUNCTIONS(X) \
  X(norm_forward)              \
  X(norm_backward)             \
  X(bias_gelu_forward)         \
  X(bias_gelu_backward)        \
  X(swiglu_forward)            \
  X(swiglu_backward)           \
  X(rotary)                    \
  X(softmax_forward)           \
  X(softmax_backward)          \
  X(cross_entropy_stats)       \
  X(cross_entropy_grad)        \
  X(dropout)                   \
  X(attention_forward)         \
  X(attention_workspace)       \
  X(attention_backward)
