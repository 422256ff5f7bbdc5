"""LayerNorm and RMSNorm, alone and with the residual addition before them."""

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.native.kernels import check_vector, launch, rows_of, workspace
from megatron_lite.ops.native.operator import Operator, Raw


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y, x + residual, mean (empty for RMSNorm), and the reciprocal of the standard deviation."""
    x, rows = x.contiguous(), rows_of(x)
    residual = None if residual is None else residual.contiguous()
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    mean = torch.empty(0 if rms else rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch("norm_forward", x, rms, rows, x.size(-1), eps, x, residual, weight, bias, y, total, mean, rstd)
    return y, total, mean, rstd


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _run(x, None, weight, bias, eps, rms)
    return y, mean, rstd


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = _run(x, residual, weight, bias, eps, rms)
    assert total is not None
    return y, total, mean, rstd


def _gradient(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and (empty without `bias`) of the bias, all in the type of x."""
    dy, x, rows, cols = dy.contiguous(), x.contiguous(), rows_of(x), x.size(-1)
    dsum = None if dsum is None else dsum.contiguous()
    dx = torch.empty_like(x)
    dweight = torch.empty(cols, dtype=torch.float32, device=x.device)
    dbias = torch.empty(cols if bias else 0, dtype=torch.float32, device=x.device)
    room, parts = workspace(x, rows, cols, 2 * cols if bias else cols)
    launch(
        "norm_backward", x, rms, rows, cols, dy, dsum, x, weight, mean, rstd, dx, dweight, dbias, room, parts
    )
    return dx, dweight.to(x.dtype), dbias.to(x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    weight, _, _, ctx.rms = inputs[-4:]
    ctx.save_for_backward(inputs[0] if len(outputs) == 3 else outputs[1], weight, *outputs[-2:])


def _backward(ctx: Any, gradient: Raw, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Any, ...]:
    bias = ctx.needs_input_grad[-3]
    terms = len(ctx.needs_input_grad) - 4  # of the sum that is normalised: x, or x and the residual
    if dy is None:
        return (*(dsum,) * terms, None, None, None, None)
    dx, dweight, dbias = gradient(dy, dsum, *ctx.saved_tensors, ctx.rms, bias)
    return (*(dx,) * terms, dweight, dbias if bias else None, None, None)


_norm_operator = Operator("norm", _norm, _gradient, _save, _backward)
_add_norm_operator = Operator("add_norm", _add_norm, _gradient, _save, _backward, results=2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.layer_norm`."""
    y: Tensor = _norm_operator(x, *_checked(x, weight, bias), eps, False)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    y: Tensor = _norm_operator(x, *_checked(x, weight, None), eps, True)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_layer_norm`."""
    y, total = _add_norm_operator(x, _same(x, residual), *_checked(x, weight, bias), eps, False)
    return y, total


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    y, total = _add_norm_operator(x, _same(x, residual), *_checked(x, weight, None), eps, True)
    return y, total


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    cols = x.size(-1)
    weight = check_vector("weight", weight, x, cols)
    return weight, None if bias is None else check_vector("bias", bias, x, cols)


def _same(x: Tensor, residual: Tensor) -> Tensor:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        given = f"{residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"residual is {given}; it must be as x is: {x.dtype} {tuple(x.shape)}")
    return residual
