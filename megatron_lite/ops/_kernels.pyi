"""The kernels of csrc, one function per function of csrc/include, whose names and order of arguments these are.

An address is an integer: a tensor's data_ptr(), a stream's handle, 0 for what is absent. Nothing is checked. Strides
are those of the first three dimensions, in elements.

Raises:
    RuntimeError: a function without a result failed; CUDA's error in words.
"""

from typing import Literal

_Address = int
_Strides = tuple[int, int, int]

# Whether nvcc was there when the package was built; where not, the functions of `cuda_` are absent.
cuda_compiled: bool
cuda_architectures: tuple[str, ...]

def cpu_instruction_set() -> Literal["avx512bf16", "avx512", "avx2", "baseline"]: ...
def cpu_num_threads() -> int: ...

# fmt: off

# kernels.h
def cpu_workspace_rows(rows: int, cols: int, /) -> int: ...
def cuda_workspace_rows(rows: int, cols: int, /) -> int: ...
def cpu_norm_forward(
    dtype: int, rms: bool, rows: int, cols: int, eps: float, x: _Address, residual: _Address,
    weight: _Address, bias: _Address, y: _Address, sum: _Address, mean: _Address, rstd: _Address, /
) -> None: ...
def cuda_norm_forward(
    dtype: int, rms: bool, rows: int, cols: int, eps: float, x: _Address, residual: _Address,
    weight: _Address, bias: _Address, y: _Address, sum: _Address, mean: _Address, rstd: _Address,
    stream: _Address, /
) -> None: ...
def cpu_norm_backward(
    dtype: int, rms: bool, rows: int, cols: int, dy: _Address, dsum: _Address, x: _Address, weight: _Address,
    mean: _Address, rstd: _Address, dx: _Address, dweight: _Address, dbias: _Address, workspace: _Address,
    workspace_rows: int, /
) -> None: ...
def cuda_norm_backward(
    dtype: int, rms: bool, rows: int, cols: int, dy: _Address, dsum: _Address, x: _Address, weight: _Address,
    mean: _Address, rstd: _Address, dx: _Address, dweight: _Address, dbias: _Address, workspace: _Address,
    workspace_rows: int, stream: _Address, /
) -> None: ...
def cpu_bias_gelu_forward(
    dtype: int, tanh: bool, rows: int, cols: int, x: _Address, bias: _Address, y: _Address, /
) -> None: ...
def cuda_bias_gelu_forward(
    dtype: int, tanh: bool, rows: int, cols: int, x: _Address, bias: _Address, y: _Address, stream: _Address,
    /
) -> None: ...
def cpu_bias_gelu_backward(
    dtype: int, tanh: bool, rows: int, cols: int, dy: _Address, x: _Address, bias: _Address, dx: _Address,
    dbias: _Address, workspace: _Address, workspace_rows: int, /
) -> None: ...
def cuda_bias_gelu_backward(
    dtype: int, tanh: bool, rows: int, cols: int, dy: _Address, x: _Address, bias: _Address, dx: _Address,
    dbias: _Address, workspace: _Address, workspace_rows: int, stream: _Address, /
) -> None: ...
def cpu_swiglu_forward(
    dtype: int, rows: int, cols: int, x: _Address, bias: _Address, y: _Address, /
) -> None: ...
def cuda_swiglu_forward(
    dtype: int, rows: int, cols: int, x: _Address, bias: _Address, y: _Address, stream: _Address, /
) -> None: ...
def cpu_swiglu_backward(
    dtype: int, rows: int, cols: int, dy: _Address, x: _Address, bias: _Address, dx: _Address,
    dbias: _Address, workspace: _Address, workspace_rows: int, /
) -> None: ...
def cuda_swiglu_backward(
    dtype: int, rows: int, cols: int, dy: _Address, x: _Address, bias: _Address, dx: _Address,
    dbias: _Address, workspace: _Address, workspace_rows: int, stream: _Address, /
) -> None: ...
def cpu_rotary(
    dtype: int, batch: int, seq: int, heads_q: int, heads_k: int, head_dim: int, rotary_dim: int, q: _Address,
    q_stride_b: int, q_stride_s: int, q_stride_h: int, k: _Address, k_stride_b: int, k_stride_s: int,
    k_stride_h: int, q_out: _Address, q_out_stride_b: int, q_out_stride_s: int, q_out_stride_h: int,
    k_out: _Address, k_out_stride_b: int, k_out_stride_s: int, k_out_stride_h: int, cos: _Address,
    sin: _Address, cos_batch_stride: int, inverse: bool, /
) -> None: ...
def cuda_rotary(
    dtype: int, batch: int, seq: int, heads_q: int, heads_k: int, head_dim: int, rotary_dim: int, q: _Address,
    q_stride_b: int, q_stride_s: int, q_stride_h: int, k: _Address, k_stride_b: int, k_stride_s: int,
    k_stride_h: int, q_out: _Address, q_out_stride_b: int, q_out_stride_s: int, q_out_stride_h: int,
    k_out: _Address, k_out_stride_b: int, k_out_stride_s: int, k_out_stride_h: int, cos: _Address,
    sin: _Address, cos_batch_stride: int, inverse: bool, stream: _Address, /
) -> None: ...
def cpu_softmax_forward(
    dtype: int, batch: int, heads: int, queries: int, keys: int, scale: float, x: _Address, mask: _Address,
    mask_stride_b: int, mask_stride_h: int, mask_stride_q: int, mask_stride_k: int, segments_q: _Address,
    segments_k: _Address, causal: bool, y: _Address, /
) -> None: ...
def cuda_softmax_forward(
    dtype: int, batch: int, heads: int, queries: int, keys: int, scale: float, x: _Address, mask: _Address,
    mask_stride_b: int, mask_stride_h: int, mask_stride_q: int, mask_stride_k: int, segments_q: _Address,
    segments_k: _Address, causal: bool, y: _Address, stream: _Address, /
) -> None: ...
def cpu_softmax_backward(
    dtype: int, rows: int, keys: int, scale: float, dy: _Address, y: _Address, dx: _Address, /
) -> None: ...
def cuda_softmax_backward(
    dtype: int, rows: int, keys: int, scale: float, dy: _Address, y: _Address, dx: _Address, stream: _Address,
    /
) -> None: ...
def cpu_cross_entropy_stats(
    dtype: int, rows: int, cols: int, valid: int, start: int, logits: _Address, labels: _Address,
    max: _Address, sum: _Address, label_logit: _Address, /
) -> None: ...
def cuda_cross_entropy_stats(
    dtype: int, rows: int, cols: int, valid: int, start: int, logits: _Address, labels: _Address,
    max: _Address, sum: _Address, label_logit: _Address, stream: _Address, /
) -> None: ...
def cpu_cross_entropy_grad(
    dtype: int, rows: int, cols: int, valid: int, start: int, logits: _Address, labels: _Address,
    max: _Address, sum: _Address, grad: _Address, z_loss: float, /
) -> None: ...
def cuda_cross_entropy_grad(
    dtype: int, rows: int, cols: int, valid: int, start: int, logits: _Address, labels: _Address,
    max: _Address, sum: _Address, grad: _Address, z_loss: float, stream: _Address, /
) -> None: ...
def cpu_dropout(
    dtype: int, rows: int, cols: int, row_stride: int, offset: int, p: float, seed: int, x: _Address,
    y: _Address, /
) -> None: ...
def cuda_dropout(
    dtype: int, rows: int, cols: int, row_stride: int, offset: int, p: float, seed: int, x: _Address,
    y: _Address, stream: _Address, /
) -> None: ...

# attention.h
def cpu_attention_forward(
    dtype: int, batch: int, heads: int, groups: int, queries: int, keys: int, head_dim: int, scale: float,
    causal: bool, q: _Address, q_strides: _Strides, k: _Address, k_strides: _Strides, v: _Address,
    v_strides: _Strides, segments_q: _Address, segments_k: _Address, dropout_p: float, dropout_seed: int,
    dropout_head: int, dropout_heads: int, o: _Address, o_strides: _Strides, lse: _Address, /
) -> None: ...
def cuda_attention_forward(
    dtype: int, batch: int, heads: int, groups: int, queries: int, keys: int, head_dim: int, scale: float,
    causal: bool, q: _Address, q_strides: _Strides, k: _Address, k_strides: _Strides, v: _Address,
    v_strides: _Strides, segments_q: _Address, segments_k: _Address, dropout_p: float, dropout_seed: int,
    dropout_head: int, dropout_heads: int, o: _Address, o_strides: _Strides, lse: _Address, stream: _Address,
    /
) -> None: ...
def cpu_attention_workspace(batch: int, heads: int, queries: int, head_dim: int, /) -> int: ...
def cuda_attention_workspace(batch: int, heads: int, queries: int, head_dim: int, /) -> int: ...
def cpu_attention_backward(
    dtype: int, batch: int, heads: int, groups: int, queries: int, keys: int, head_dim: int, scale: float,
    causal: bool, q: _Address, q_strides: _Strides, k: _Address, k_strides: _Strides, v: _Address,
    v_strides: _Strides, segments_q: _Address, segments_k: _Address, dropout_p: float, dropout_seed: int,
    dropout_head: int, dropout_heads: int, o: _Address, o_strides: _Strides, lse: _Address, do_: _Address,
    do_strides: _Strides, dq: _Address, dq_strides: _Strides, dk: _Address, dk_strides: _Strides,
    dv: _Address, dv_strides: _Strides, workspace: _Address, /
) -> None: ...
def cuda_attention_backward(
    dtype: int, batch: int, heads: int, groups: int, queries: int, keys: int, head_dim: int, scale: float,
    causal: bool, q: _Address, q_strides: _Strides, k: _Address, k_strides: _Strides, v: _Address,
    v_strides: _Strides, segments_q: _Address, segments_k: _Address, dropout_p: float, dropout_seed: int,
    dropout_head: int, dropout_heads: int, o: _Address, o_strides: _Strides, lse: _Address, do_: _Address,
    do_strides: _Strides, dq: _Address, dq_strides: _Strides, dk: _Address, dk_strides: _Strides,
    dv: _Address, dv_strides: _Strides, workspace: _Address, stream: _Address, /
) -> None: ...
