"""Softmax of attention scores over the keys that a query may see."""

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.arguments import Documents
from megatron_lite.ops.native.kernels import check_documents, launch, rows_of
from megatron_lite.ops.native.operator import Operator, Raw


def _forward(
    x: Tensor, scale: float, causal: bool, queries: Tensor | None, keys: Tensor | None, mask: Tensor | None
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    launch("softmax_forward", x, *x.shape, scale, x, mask, *strides, queries, keys, causal, y)
    return y


def _gradient(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    dy = dy.contiguous()
    dx = torch.empty_like(dy)
    launch("softmax_backward", dy, rows_of(y), y.size(-1), scale, dy, y, dx)
    return dx


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.scale = inputs[1]
    ctx.save_for_backward(*outputs)


def _backward(ctx: Any, gradient: Raw, dy: Tensor) -> tuple[Any, ...]:
    return gradient(dy, *ctx.saved_tensors, ctx.scale), None, None, None, None, None


_operator = Operator("softmax", _forward, _gradient, _save, _backward)


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    documents: Documents | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.softmax`."""
    queries, keys = check_documents(documents, x.size(0), x.size(2), x.size(3))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}; it must be bool, True where attention is allowed")
        mask = mask.expand(x.shape)
    y: Tensor = _operator(x, scale, causal, queries, keys, mask)
    return y
