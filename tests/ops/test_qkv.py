"""Queries, keys and values of one projection: views, and gradients that are written where they belong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import native, sdpa
from megatron_lite.ops.qkv import split_qkv
from tests.ops.native.cases import numbers, weights


def plain(qkv: Tensor, groups: int, heads_per_group: int, head_dim: int) -> tuple[Tensor, ...]:
    parts = qkv.unflatten(-1, (groups, heads_per_group + 2, head_dim))
    q, k, v = parts.split((heads_per_group, 1, 1), dim=-2)
    return tuple(x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))


def gradient(
    qkv: Tensor, split: Any, sizes: tuple[int, int, int], attend: Any
) -> tuple[Tensor, Tensor, list[int]]:
    """Attention's result, the gradient of the projection, and the addresses of those of q, k and v."""
    qkv, found = qkv.detach().requires_grad_(), []
    parts = split(qkv, *sizes)
    for x in parts:
        x.register_hook(lambda grad: found.append(grad.data_ptr()))
    out = attend(*parts)
    (grad,) = torch.autograd.grad(out, qkv, weights(out).to(out.dtype))
    return out.detach(), grad, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend", [native.attention, sdpa.attention])
@pytest.mark.parametrize("sizes", [(3, 1, 8), (1, 1, 16), (2, 2, 8)], ids=str)
def test_the_same_as_a_plain_split(sizes: tuple[int, int, int], attend: Any, dtype: torch.dtype) -> None:
    groups, share, d = sizes
    qkv = numbers(2, 5, groups * (share + 2) * d, dtype=dtype)
    for ours, theirs in zip(split_qkv(qkv, *sizes), plain(qkv, *sizes), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (gradient(qkv, split, sizes, attend) for split in (split_qkv, plain))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_nothing_is_copied() -> None:
    qkv = numbers(2, 5, 3 * 3 * 8, dtype=torch.float32)
    assert {x.untyped_storage().data_ptr() for x in split_qkv(qkv, 3, 1, 8)} == {qkv.data_ptr()}
    _, grad, parts = gradient(qkv, split_qkv, (3, 1, 8), native.attention)
    assert sorted(parts) == [grad.data_ptr() + 4 * 8 * third for third in range(3)]


def test_not_every_view_is_a_third() -> None:
    """Keys that are the values, too, or the queries: their gradients must not share memory."""
    q, k, _ = split_qkv(numbers(2, 5, 3 * 3 * 8, dtype=torch.float32), 3, 1, 8)
    for inputs in ((q, k, k), (q, q, q), (k, q, q)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        copies = [x.detach().clone().requires_grad_() for x in inputs]
        ours, theirs = (torch.autograd.grad(native.attention(*xs).sin().sum(), xs) for xs in (leaves, copies))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_somebody_elses_thirds_are_left_alone() -> None:
    qkv = numbers(2, 5, 3 * 3 * 8, dtype=torch.float32).requires_grad_()
    other = numbers(2, 5, 3 * 3 * 8, dtype=torch.float32, seed=1)
    before = other.clone()
    dq, dk, _ = split_qkv(other, 3, 1, 8)
    q, k, v = split_qkv(qkv, 3, 1, 8)
    (grad,) = torch.autograd.grad((q, k, v), qkv, (dq, dk, dk))
    thirds = split_qkv(grad, 3, 1, 8)
    assert all(torch.equal(a, b) for a, b in zip(thirds, (dq, dk, dk), strict=True))
    assert torch.equal(other, before)


def test_thirds_of_two_tensors_are_no_thirds() -> None:
    qkv = numbers(2, 5, 3 * 3 * 8, dtype=torch.float32).requires_grad_()
    one, two = (numbers(2, 5, 3 * 3 * 8, dtype=torch.float32, seed=seed) for seed in (1, 2))
    mixed = (split_qkv(one, 3, 1, 8)[0], *split_qkv(two, 3, 1, 8)[1:])
    (grad,) = torch.autograd.grad(split_qkv(qkv, 3, 1, 8), qkv, mixed)
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(grad, 3, 1, 8), mixed, strict=True))


def test_compiled() -> None:
    qkv = numbers(2, 5, 3 * 3 * 8, dtype=torch.float32)

    def attend(qkv: Tensor) -> Tensor:
        return native.attention(*split_qkv(qkv, 3, 1, 8))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        leaf = qkv.detach().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
