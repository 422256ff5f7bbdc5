"""Dropout that is the same on every layout, and again when it is recomputed.

Whether an element is dropped depends on a seed, made of (run seed, step, micro-batch, place in the model), and on the
element's index in the whole tensor (`ops.philox`). So there is no generator state to fork per region, to keep for
recomputation or to save in checkpoints: tensor ranks agree where they hold the same activations and differ where
they hold different ones, whatever the number of stages or ranks.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.ops import Ops
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


def dropout(x: Tensor, p: float, seed: int, mesh: Mesh, ops: Ops, *, sharded: bool = False) -> Tensor:
    """Zeroes elements with probability p and scales the rest by 1 / (1 - p).

    Args:
        x: [b, s, h], or with `sharded` this tensor rank's [b, s/t, h]; else it is the same on all of them.
        seed: decides the mask, with each element's index in the whole tensor.
    """
    if not sharded:
        return ops.dropout(x, p, seed)
    row = x[0].numel()
    return ops.dropout(x, p, seed, offset=mesh.tensor_rank * row, row_stride=mesh.tensor_size * row)


def place_seed(context_seed: int, place: str) -> int:
    """The seed of one dropout site: `context_seed` stands for (run seed, step, micro-batch)."""
    return derive_seed(context_seed, place)
