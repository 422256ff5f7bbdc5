"""Queries, keys and values out of one projection, and their gradients back into one tensor without copying them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def split_qkv(qkv: Tensor, groups: int, heads_per_group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [b, heads, s, d], keys and values [b, groups, s, d] of a projection laid out by group.

    Without grouped queries all are views; and where the gradients are views of one tensor in the same way, as those of
    `native.attention` are, that tensor is the gradient of the projection.

    Args:
        qkv: [b, s, groups * (heads_per_group + 2) * d]: for each group its query heads, its key head, its value head.
    """
    if heads_per_group == 1 and qkv.is_contiguous() and not torch.compiler.is_compiling():
        q, k, v = _Split.apply(qkv, groups, head_dim)
        return q, k, v
    heads = qkv.unflatten(-1, (groups, heads_per_group + 2, head_dim))
    q, k, v = heads.split((heads_per_group, 1, 1), dim=-2)
    return q.flatten(2, 3).transpose(1, 2), k.squeeze(-2).transpose(1, 2), v.squeeze(-2).transpose(1, 2)


def new_thirds(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like q, k and v, not initialized; the thirds of one tensor where those are."""
    if not _are_thirds(q, k, v):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    b, h, s, d = q.shape
    return _thirds(torch.empty((b, s, h * 3 * d), dtype=q.dtype, device=q.device), h, d)


def _thirds(qkv: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    b, s, width = qkv.shape
    size, strides = (b, heads, s, head_dim), (s * width, 3 * head_dim, width, 1)
    start = qkv.storage_offset()
    q, k, v = (qkv.as_strided(size, strides, start + third * head_dim) for third in range(3))
    return q, k, v


def _are_thirds(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are what `_thirds` returns of some tensor."""
    _, h, s, d = q.shape
    return (
        q.shape == k.shape == v.shape
        and q.stride() == k.stride() == v.stride() == (s * h * 3 * d, 3 * d, h * 3 * d, 1)
        and q.storage_offset() + 2 * d == k.storage_offset() + d == v.storage_offset()
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    )


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        return _thirds(qkv, heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (b, h, s, d), first = grads[0].shape, grads[0]
        if _are_thirds(*grads):
            width = h * 3 * d
            return first.as_strided((b, s, width), (s * width, width, 1)), None, None
        qkv = torch.empty((b, s, h * 3 * d), dtype=first.dtype, device=first.device)
        for third, grad in zip(_thirds(qkv, h, d), grads, strict=True):
            third.copy_(grad)
        return qkv, None, None
