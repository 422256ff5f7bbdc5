"""Rotary position embedding of q and k in one pass; its gradient is the rotation back."""

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.native.kernels import launch, strided
from megatron_lite.ops.native.operator import Operator, Raw


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = strided(q), strided(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)  # in memory [b, s, heads, d] where q and k are
    (batch, heads, seq, head_dim), rotary_dim = q.shape, cos.size(-1)
    table = seq * rotary_dim if cos.dim() == 4 and cos.size(0) > 1 else 0
    launch(
        "rotary", q, batch, seq, heads, k.size(1), head_dim, rotary_dim,
        q, *_strides(q), k, *_strides(k), q_out, *_strides(q_out), k_out, *_strides(k_out), cos, sin, table, inverse,
    )  # fmt: skip
    return q_out, k_out


def _strides(x: Tensor) -> tuple[int, int, int]:
    batch, head, position, _ = x.stride()
    return batch, position, head


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, gradient: Raw, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:
    if dq is None and dk is None:
        return None, None, None, None, None
    if dq is None or dk is None:  # no heads there
        none = (dk if dq is None else dq)[:, :0]  # type: ignore[index]
        turned = gradient(
            none if dq is None else dq, none if dk is None else dk, *ctx.saved_tensors, not ctx.inverse
        )
        return None if dq is None else turned[0], None if dk is None else turned[1], None, None, None
    return (*gradient(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None)


_operator = Operator("rotary", _forward, None, _save, _backward, results=2)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.rotary`. Strides are followed: nothing is copied where the features are contiguous."""
    b, _, s, d = q.shape
    if k.dtype != q.dtype or (k.size(0), *k.shape[2:]) != (b, s, d):
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)}, k {k.dtype} {tuple(k.shape)}; only heads may differ"
        )
    r = cos.size(-1)
    if cos.shape != sin.shape or cos.shape not in ((s, r), (b, 1, s, r), (1, 1, s, r)) or r % 2 or r > d:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be ({s}, r) or ({b}, 1, {s}, r), r even, up to {d}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos is {cos.dtype} and sin {sin.dtype}; they must be float32")
    q_out, k_out = _operator(q, k, cos, sin, False)
    return q_out, k_out
