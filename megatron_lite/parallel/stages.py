"""A model as a list of named layers, and its balanced division into pipeline stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn


@dataclass(frozen=True)
class Layer:
    """One entry of a model's list.

    Attributes:
        name: prefix of its parameters' canonical names.
        build: makes the module, whose forward takes (hidden, context). Its argument is the weight to share where
            the layer is tied to another, else None.
        cost: multiply-adds a token of its matrix products, by which stages are balanced.
        repeated: one of the transformer blocks, of which every stage holds at least one.
        tied_to: name of the layer whose `weight` it uses instead of one of its own.
    """

    name: str
    build: Callable[[nn.Parameter | None], nn.Module]
    cost: float = 0.0
    repeated: bool = False
    tied_to: str | None = None


def stage_bounds(layers: Sequence[Layer], stages: int, blocks: Sequence[int] | None = None) -> list[int]:
    """Where each stage begins in the list of layers, and the end: `stages` + 1 numbers.

    What comes before the first block goes to the first stage, what comes after the last block to the last; the
    blocks are divided so that the most expensive stage is as cheap as possible, so a stage with a costly head gets
    fewer of them.

    Args:
        blocks: transformer blocks of each stage, where the user decides.

    Raises:
        ValueError: fewer blocks than stages, or `blocks` does not fit.
    """
    repeated = [i for i, layer in enumerate(layers) if layer.repeated]
    first, count = repeated[0], len(repeated)
    if count < stages:
        raise ValueError(f"{count} transformer blocks cannot fill {stages} pipeline stages")
    if blocks is None:
        costs = [layers[i].cost for i in repeated]
        costs[0] += sum(layer.cost for layer in layers[:first])
        costs[-1] += sum(layer.cost for layer in layers[first + count :])
        blocks = _balance(tuple(costs), stages)
    if len(blocks) != stages or sum(blocks) != count or min(blocks) < 1:
        raise ValueError(f"blocks per stage {list(blocks)} do not divide {count} blocks into {stages} stages")
    bounds = [0]
    for size in blocks[:-1]:
        bounds.append((bounds[-1] or first) + size)
    return [*bounds, len(layers)]


def _balance(costs: tuple[float, ...], stages: int) -> list[int]:
    """Sizes of contiguous parts whose largest sum is smallest; among those the most even (by sum of squares)."""

    @cache
    def best(start: int, parts: int) -> tuple[float, float, tuple[int, ...]]:
        if parts == 1:
            total = sum(costs[start:])
            return total, total**2, (len(costs) - start,)
        options = []
        for size in range(1, len(costs) - start - parts + 2):
            here = sum(costs[start : start + size])
            largest, squares, sizes = best(start + size, parts - 1)
            options.append((max(here, largest), here**2 + squares, (size, *sizes)))
        return min(options)

    return list(best(0, stages)[2])
