"""The kernels of csrc as operations: the functions of `ops.reference`, forward and backward, on CPU and CUDA."""

from megatron_lite.ops.native.activations import gelu, gelu_tanh, swiglu
from megatron_lite.ops.native.attention import attention
from megatron_lite.ops.native.cross_entropy import cross_entropy_grad, cross_entropy_stats
from megatron_lite.ops.native.dropout import dropout
from megatron_lite.ops.native.kernels import serves
from megatron_lite.ops.native.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megatron_lite.ops.native.rotary import rotary
from megatron_lite.ops.native.softmax import softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy_grad",
    "cross_entropy_stats",
    "dropout",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "rms_norm",
    "rotary",
    "serves",
    "softmax",
    "swiglu",
]
