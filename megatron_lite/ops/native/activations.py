"""GELU and SwiGLU, each with the addition of a bias before it, which is not kept for the backward pass."""

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.native.kernels import check_vector, launch, rows_of, workspace
from megatron_lite.ops.native.operator import Operator, Raw

# Operation -> its kernel, and what that takes before the sizes.
_KERNELS: dict[str, tuple[str, tuple[bool, ...]]] = {
    "gelu": ("bias_gelu", (False,)),
    "gelu_tanh": ("bias_gelu", (True,)),
    "swiglu": ("swiglu", ()),
}


def _forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    x, (kernel, options) = x.contiguous(), _KERNELS[kind]
    cols = _width(x, kind)
    y = torch.empty((*x.shape[:-1], cols), dtype=x.dtype, device=x.device)
    launch(f"{kernel}_forward", x, *options, rows_of(x), cols, x, bias, y)
    return y


def _gradient(
    dy: Tensor, x: Tensor, bias: Tensor | None, kind: str, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and (empty unless `with_bias`) of the bias."""
    dy, x, (kernel, options) = dy.contiguous(), x.contiguous(), _KERNELS[kind]
    rows, features = rows_of(x), x.size(-1)
    dx = torch.empty_like(x)
    dbias = torch.empty(features if with_bias else 0, dtype=torch.float32, device=x.device)
    room, parts = workspace(x, rows, features, features) if with_bias else (None, 0)
    launch(f"{kernel}_backward", x, *options, rows, _width(x, kind), dy, x, bias, dx, dbias, room, parts)
    return dx, dbias.to(x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, gradient: Raw, dy: Tensor) -> tuple[Any, ...]:
    with_bias = ctx.needs_input_grad[1]
    dx, dbias = gradient(dy, *ctx.saved_tensors, ctx.kind, with_bias)
    return dx, dbias if with_bias else None, None


_operator = Operator("activation", _forward, _gradient, _save, _backward)


def _width(x: Tensor, kind: str) -> int:
    return x.size(-1) // 2 if kind == "swiglu" else x.size(-1)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.gelu`."""
    return _activate(x, bias, "gelu")


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.gelu_tanh`."""
    return _activate(x, bias, "gelu_tanh")


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.swiglu`."""
    if x.size(-1) % 2:
        raise ValueError(f"swiglu takes gate and up in one tensor; {x.size(-1)} features are no even number")
    return _activate(x, bias, "swiglu")


def _activate(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    bias = None if bias is None else check_vector("bias", bias, x, x.size(-1))
    y: Tensor = _operator(x, bias, kind)
    return y
