"""Dropout that is the same on every layout, and again when it is recomputed.

Every mask is drawn from a generator seeded by (run seed, step, micro-batch, place in the model), at the global
shape, of which a rank keeps the part it holds. So there is no generator state to fork per region, to keep for
recomputation or to save in checkpoints: tensor ranks agree where they hold the same activations and differ where
they hold different ones, whatever the number of stages or ranks. The cost is that a sharded activation's mask is
drawn whole; models trained without dropout pay nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import derive_seed


@dataclass
class Clock:
    """Where training is: set by the engine before each micro-batch, read when a forward pass begins.

    Attributes:
        step: number of optimizer steps done.
        micro_batch: number of this micro-batch in the global batch, counted over all data-parallel ranks.
    """

    step: int = 0
    micro_batch: int = 0


def dropout(x: Tensor, p: float, seed: int, mesh: Mesh, *, shard_dim: int | None = None) -> Tensor:
    """Zeroes elements with probability p and scales the rest by 1 / (1 - p).

    Args:
        seed: decides the mask; None of torch's generators is used.
        shard_dim: the dimension of x that is split over the tensor ranks, None where x is the same on all of them.
    """
    return x * dropout_mask(x.shape, p, seed, mesh, shard_dim, x)


def dropout_mask(
    shape: tuple[int, ...], p: float, seed: int, mesh: Mesh, shard_dim: int | None, like: Tensor
) -> Tensor:
    """The factor of `dropout`: 0 or 1 / (1 - p), of the given local shape, with `like`'s dtype and device."""
    generator = torch.Generator(like.device).manual_seed(seed)
    if shard_dim is None or mesh.tensor_size == 1:
        mask = torch.empty(shape, dtype=like.dtype, device=like.device)
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    local = shape[shard_dim]
    whole = list(shape)
    whole[shard_dim] = local * mesh.tensor_size
    mask = torch.empty(whole, dtype=like.dtype, device=like.device).bernoulli_(1 - p, generator=generator)
    return mask.narrow(shard_dim, mesh.tensor_rank * local, local) / (1 - p)


def place_seed(context_seed: int, place: str) -> int:
    """The seed of one dropout site: `context_seed` stands for (run seed, step, micro-batch)."""
    return derive_seed(context_seed, place)
