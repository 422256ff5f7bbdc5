"""Dropout that keeps nothing for the backward pass: the seed draws the same again."""

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.native.kernels import launch, signed, unsigned
from megatron_lite.ops.native.operator import Operator, Raw


def _forward(x: Tensor, p: float, seed: int, offset: int, row_stride: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.size(0)
    cols = x.numel() // rows if rows else 0
    launch("dropout", x, rows, cols, row_stride, offset, p, unsigned(seed), x, y)
    return y


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.given = inputs[1:]


def _backward(ctx: Any, gradient: Raw, dy: Tensor) -> tuple[Any, ...]:
    return gradient(dy, *ctx.given), None, None, None, None


_operator = Operator("dropout", _forward, None, _save, _backward)


def dropout(x: Tensor, p: float, seed: int, *, offset: int = 0, row_stride: int | None = None) -> Tensor:
    """`reference.dropout`."""
    rows = x.size(0)
    length = x.numel() // rows if rows else 0
    y: Tensor = _operator(x, p, signed(seed), offset, length if row_stride is None else row_stride)
    return y
