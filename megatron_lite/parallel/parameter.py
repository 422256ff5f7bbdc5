"""The one place where a parameter is made: its name, global shape, sharded dimension and initial values.

From what is recorded here (`ParameterSpec`) follow DeepSpeed's grad-norm flag, the initialisation that is the
same on every layout, the decay rule, checkpoints and conversion.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.parallel.mesh import Mesh

# DeepSpeed's zero.Init replaces torch.empty and torch.zeros by versions that change the dtype; initial values are
# drawn in fp32 with the originals, so that ZeRO-3 starts from the same weights as every other layout.
_empty, _zeros = torch.empty, torch.zeros

# Elements drawn from one generator: bounds the memory of initialisation whatever the parameter's size.
_DRAW_BLOCK = 1 << 22


@dataclass(frozen=True)
class ParameterSpec:
    """What is true of a parameter on every layout, and the slice this rank holds.

    Attributes:
        name: canonical name, independent of the layout (`blocks.0.mlp.linear_fc1.weight`).
        global_shape: shape of the whole parameter.
        dim: tensor-parallel dimension, None where every tensor rank holds the whole.
        start, stop: half-open range of `dim` held here (0 and the first dimension's size where `dim` is None).
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice held by this rank."""
        if self.dim is None:
            return self.global_shape
        return (*self.global_shape[: self.dim], self.stop - self.start, *self.global_shape[self.dim + 1 :])

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices and embeddings, not to biases and norm weights.

        Two-dimensional biases of a gated layer ([2, ffn]) are told apart by their name.
        """
        return len(self.global_shape) > 1 and not self.name.endswith(".bias")


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The record made by `create_parameter`.

    Raises:
        TypeError: the parameter was made some other way, so neither sharding nor saving it would be right.
    """
    spec = getattr(parameter, "spec", None)
    if not isinstance(spec, ParameterSpec):
        raise TypeError("a parameter without a spec: make it with parallel.parameter.create_parameter")
    return spec


def create_parameter(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    *,
    dim: int | None = None,
    std: float | None = None,
    fill: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Parameter:
    """Makes this rank's slice of a parameter.

    Args:
        name: canonical global name; with `seed` it decides the initial values.
        shape: global shape.
        dim: dimension to shard over the tensor-parallel ranks, None to replicate.
        std: standard deviation of a normal draw (mean 0), in fp32, cast to `dtype` afterwards; None: `fill`.

    Raises:
        ValueError: `dim` does not divide by the tensor-parallel size.
    """
    start, stop = (0, shape[0]) if dim is None else mesh.shard(shape[dim])
    spec = ParameterSpec(name, tuple(shape), dim, start, stop)
    if torch.device(device).type == "meta":
        data = _empty(spec.shape, dtype=dtype, device=device)
    elif std is None:
        data = (_zeros(spec.shape) + fill).to(device, dtype)
    else:
        data = draw_normal(spec, std, seed).to(device, dtype)
    parameter = nn.Parameter(data)
    mark(parameter, spec)
    return parameter


def mark(parameter: nn.Parameter, spec: ParameterSpec) -> None:
    """Attaches the spec, and DeepSpeed's flag for parameters whose squared norm must be summed over tensor ranks.

    Without the flag the gradient norm is silently too small, and clipping with it.
    """
    parameter.spec = spec  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = spec.dim is not None  # type: ignore[attr-defined]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a tuple of names and numbers, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(number, first row, last row + 1) of the blocks in which a [rows, ...] parameter is drawn."""
    rows = max(1, _DRAW_BLOCK // max(1, math.prod(shape[1:])))
    for number, first in enumerate(range(0, shape[0], rows)):
        yield number, first, min(first + rows, shape[0])


def draw_normal(spec: ParameterSpec, std: float, seed: int) -> Tensor:
    """This rank's slice, in fp32 on the CPU, of a normal draw at the global shape.

    The parameter is drawn in blocks of rows, each from a generator seeded by (seed, name, block), so every layout
    sees the same values; blocks that hold none of this rank's rows are not drawn, and no more than one block
    beyond the slice itself is ever in memory.
    """
    out = _empty(spec.shape)
    generator = torch.Generator()
    for number, first, last in _row_blocks(spec.global_shape):
        rows = slice(first, last)
        if spec.dim == 0:
            low, high = max(first, spec.start), min(last, spec.stop)
            if low >= high:
                continue
            rows = slice(low - spec.start, high - spec.start)
        generator.manual_seed(derive_seed(seed, spec.name, number))
        block = _empty((last - first, *spec.global_shape[1:])).normal_(0.0, std, generator=generator)
        if spec.dim == 0:
            block = block[low - first : high - first]
        elif spec.dim is not None:
            block = block.narrow(spec.dim, spec.start, spec.stop - spec.start)
        out[rows] = block
    return out
