"""Collectives over the tensor-parallel group, each paired with its gradient.

The pairs are those of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, f and g; Korthikanti et al. 2022,
arXiv:2205.05198, the sequence-parallel forms). Activations are [batch, sequence, hidden]; the sequence is
dimension 1. Every function is the identity when the mesh has one tensor-parallel rank.

| forward                 | backward        | function                             |
|-------------------------|-----------------|--------------------------------------|
| identity                | all-reduce      | copy_to_tensor_region                |
| all-reduce              | identity        | reduce_from_tensor_region            |
| all-gather (sequence)   | reduce-scatter  | gather_from_sequence_region          |
| reduce-scatter          | all-gather      | reduce_scatter_to_sequence_region    |
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_lite.parallel.mesh import Mesh

SEQUENCE_DIM = 1

# torch 2.13 renamed these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the tensor-parallel group, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=mesh.tensor_group)
    return x


def start_all_reduce(x: Tensor, mesh: Mesh) -> Callable[[], Tensor]:
    """Begins to sum a contiguous x over the tensor-parallel group, in place; the result is what is returned gives."""
    work = dist.all_reduce(x, group=mesh.tensor_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x

    return finish


def start_all_gather(x: Tensor, mesh: Mesh, dim: int) -> Callable[[], Tensor]:
    """Begins `all_gather`; the result is what is returned gives."""
    parts = x.new_empty(mesh.tensor_size * x.size(0), *x.shape[1:])
    work = _all_gather(parts, x.contiguous(), group=mesh.tensor_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return torch.cat(parts.chunk(mesh.tensor_size), dim)

    return finish


def start_reduce_scatter(x: Tensor, mesh: Mesh, dim: int) -> Callable[[], Tensor]:
    """Begins `reduce_scatter`; the result is what is returned gives."""
    parts = x.chunk(mesh.tensor_size, dim)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    # Bound here, so that it lives as long as the transfer reads it.
    whole = torch.cat(parts)
    work = _reduce_scatter(out, whole, group=mesh.tensor_group, async_op=True)

    def finish() -> Tensor:
        nonlocal whole
        work.wait()
        del whole
        return out

    return finish


def all_gather(x: Tensor, mesh: Mesh, dim: int) -> Tensor:
    """Concatenation over the tensor-parallel group along `dim`."""
    return start_all_gather(x, mesh, dim)()


def reduce_scatter(x: Tensor, mesh: Mesh, dim: int) -> Tensor:
    """Sum over the tensor-parallel group, of which this rank keeps its slice along `dim`."""
    return start_reduce_scatter(x, mesh, dim)()


def own_slice(x: Tensor, mesh: Mesh, dim: int) -> Tensor:
    """This tensor rank's slice along `dim`."""
    return x.chunk(mesh.tensor_size, dim)[mesh.tensor_rank].contiguous()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.mesh), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        return all_reduce(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return all_gather(x, mesh, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.mesh, SEQUENCE_DIM), None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return reduce_scatter(x, mesh, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.mesh, SEQUENCE_DIM), None


def _apply(function: type[Function], x: Tensor, mesh: Mesh) -> Tensor:
    return x if mesh.tensor_size == 1 else function.apply(x, mesh)


def copy_to_tensor_region(x: Tensor, mesh: Mesh) -> Tensor:
    """Identity whose gradient is summed: where a replicated tensor is used by ranks that each see a part."""
    return _apply(_Copy, x, mesh)


def reduce_from_tensor_region(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum of the ranks' partial results; its gradient is already the same everywhere."""
    return _apply(_Reduce, x, mesh)


def gather_from_sequence_region(x: Tensor, mesh: Mesh) -> Tensor:
    """[b, s/t, h] -> [b, s, h]."""
    return _apply(_Gather, x, mesh)


def reduce_scatter_to_sequence_region(x: Tensor, mesh: Mesh) -> Tensor:
    """Partial sums [b, s, h] -> summed slice [b, s/t, h]."""
    return _apply(_ReduceScatter, x, mesh)


def enter_tensor_region(x: Tensor, mesh: Mesh) -> Tensor:
    """From the layout between sublayers to the full sequence that a column-parallel layer reads.

    Identity at size 1; gradient all-reduce under tensor parallelism; all-gather under sequence parallelism.
    """
    return gather_from_sequence_region(x, mesh) if mesh.sequence_parallel else copy_to_tensor_region(x, mesh)


def leave_tensor_region(x: Tensor, mesh: Mesh) -> Tensor:
    """From a row-parallel layer's partial sums back to the layout between sublayers."""
    if mesh.sequence_parallel:
        return reduce_scatter_to_sequence_region(x, mesh)
    return reduce_from_tensor_region(x, mesh)
