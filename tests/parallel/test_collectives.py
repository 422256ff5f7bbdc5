"""Collectives against what they say on the whole tensor, forward and backward."""

import pytest
import torch
from torch import Tensor

from megatron_lite.parallel import collectives
from megatron_lite.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_ranks

RANKS = 4


def value(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def apply(name: str, shape: tuple[int, ...], out_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    mesh = build_mesh(RANKS)
    x = value(mesh.rank, *shape).requires_grad_()
    # Not contiguous, as after a transpose in attention.
    y = getattr(collectives, name)(x.transpose(0, 2).contiguous().transpose(0, 2), mesh)
    y.backward(value(10 + mesh.rank, *out_shape).transpose(0, 2).contiguous().transpose(0, 2))
    assert x.grad is not None
    return y.detach(), x.grad, x.detach()


def slices(x: Tensor) -> list[Tensor]:
    return list(x.chunk(RANKS, dim=1))


WHOLE, PART = (2, 8, 3), (2, 2, 3)
XS = {shape: [value(rank, *shape) for rank in range(RANKS)] for shape in (WHOLE, PART)}
GS = {shape: [value(10 + rank, *shape) for rank in range(RANKS)] for shape in (WHOLE, PART)}
CASES = {
    "copy_to_tensor_region": (WHOLE, WHOLE, XS[WHOLE], [sum(GS[WHOLE])] * RANKS),
    "reduce_from_tensor_region": (WHOLE, WHOLE, [sum(XS[WHOLE])] * RANKS, GS[WHOLE]),
    "gather_from_sequence_region": (PART, WHOLE, [torch.cat(XS[PART], 1)] * RANKS, slices(sum(GS[WHOLE]))),  # type: ignore[arg-type]
    "reduce_scatter_to_sequence_region": (
        WHOLE,
        PART,
        slices(sum(XS[WHOLE])),  # type: ignore[arg-type]
        [torch.cat(GS[PART], 1)] * RANKS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradient(name: str) -> None:
    shape, out_shape, outputs, gradients = CASES[name]
    for rank, (y, gradient, x) in enumerate(run_ranks(RANKS, apply, name, shape, out_shape)):
        torch.testing.assert_close(y, outputs[rank])
        torch.testing.assert_close(gradient, gradients[rank])
        assert torch.equal(x, XS[shape][rank]), "the input was changed"


def round_trip(sequence: bool) -> tuple[Tensor, Tensor]:
    mesh = build_mesh(RANKS, sequence_parallel=sequence)
    x = value(0, *WHOLE)
    x = (slices(x)[mesh.rank] if sequence else x).clone().requires_grad_()
    y = collectives.leave_tensor_region(collectives.enter_tensor_region(x, mesh) * (mesh.rank + 1), mesh)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("sequence", [False, True])
def test_through_a_tensor_region(sequence: bool) -> None:
    """Each rank multiplies by its number; together they multiply by 10, and so does the gradient."""
    found = run_ranks(RANKS, round_trip, sequence)
    for rank, (y, gradient) in enumerate(found):
        x = value(0, *WHOLE)
        torch.testing.assert_close(y, 10 * (slices(x)[rank] if sequence else x))
        torch.testing.assert_close(gradient, torch.full_like(y, 10))


def test_one_rank_costs_nothing() -> None:
    x = value(0, *WHOLE)
    for name in (*CASES, "enter_tensor_region", "leave_tensor_region"):
        assert getattr(collectives, name)(x, Mesh()) is x
