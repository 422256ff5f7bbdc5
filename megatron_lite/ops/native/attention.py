"""Causal attention in one kernel, which keeps no probabilities: the backward pass computes them again."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops.arguments import Documents, ProbabilityDropout
from megatron_lite.ops.native.kernels import (
    attention_workspace,
    check_documents,
    launch,
    signed,
    strided,
    unsigned,
)
from megatron_lite.ops.native.operator import Operator, Raw
from megatron_lite.ops.qkv import new_thirds


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    first_head: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """The output, in memory [b, s, heads, d] as the next linear layer reads it, and the scores' log-sum-exp."""
    q, k, v = (_readable(x) for x in (q, k, v))
    b, h, s, d = q.shape
    out = torch.empty((b, s, h, d), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    launch(
        "attention_forward", q, b, h, k.size(1), s, k.size(2), d, scale, True, *_with_strides(q, k, v), queries, keys,
        p, unsigned(seed), first_head, heads, *_with_strides(out), lse,
    )  # fmt: skip
    return out, lse


def _gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    first_head: int,
    heads: int,
    thirds: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; with `thirds`, those of one tensor where q, k and v are."""
    q, k, v, grad = (_readable(x) for x in (q, k, v, grad))
    b, h, s, d = q.shape
    dq, dk, dv = new_thirds(q, k, v) if thirds else (torch.empty_like(x) for x in (q, k, v))
    launch(
        "attention_backward", q, b, h, k.size(1), s, k.size(2), d, scale, True, *_with_strides(q, k, v), queries, keys,
        p, unsigned(seed), first_head, heads, *_with_strides(out), lse, *_with_strides(grad, dq, dk, dv),
        attention_workspace(q),
    )  # fmt: skip
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    return strided(x, 8 if x.is_cuda else 1)  # tensor cores are fed 16 bytes at a time


def _with_strides(*tensors: Tensor) -> tuple[Any, ...]:
    """What kernels take for tensors with strides: each one's address, then its strides without the features'."""
    return tuple(part for x in tensors for part in (x, x.stride()[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    q, k, v, queries, keys, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *outputs, queries, keys)


def _backward(ctx: Any, gradient: Raw, grad: Tensor) -> tuple[Any, ...]:
    eager = gradient is _gradient  # operators of torch.library may not return tensors that share memory
    return (*gradient(grad, *ctx.saved_tensors, *ctx.rest, eager), *(None,) * 7)


_operator = Operator("attention", _forward, _gradient, _save, _backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """`reference.attention`; in memory the result is [b, s, heads, d].

    Strides are followed: nothing is copied where the features are contiguous. On CUDA, sizes of heads that are no
    multiple of 8 cost a copy.
    """
    (b, h, s, d), (groups, t) = q.shape, k.shape[1:3]
    if (
        k.shape != v.shape
        or (k.size(0), k.size(3)) != (b, d)
        or h % groups
        or not q.dtype == k.dtype == v.dtype
    ):
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (q, k, v))
        raise ValueError(
            f"q, k, v are {shapes}; they must have one type, and be [b, h, s, d] and twice [b, g, t, d], g dividing h"
        )
    if d > 256:
        raise ValueError(f"heads of {d} features; the kernels take up to 256")
    given = (*check_documents(documents, b, s, t), 1 / math.sqrt(d), *_dropout(dropout, h))
    if q.is_cuda and d % 8:
        q, k, v = (F.pad(x, (0, -d % 8)) for x in (q, k, v))
    out: Tensor = _operator(q, k, v, *given)
    return out if out.size(3) == d else out.narrow(3, 0, d)


def _dropout(dropout: ProbabilityDropout | None, heads: int) -> tuple[float, int, int, int]:
    if dropout is None:
        return 0.0, 0, 0, heads
    return dropout.p, signed(dropout.seed), dropout.first_head, dropout.heads or heads
