"""Simulated ranks: threads that gather, and the pieces that a layout gives to each."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint import KINDS, Piece, save

State = dict[str, dict[str, torch.Tensor]]  # kind -> name -> whole tensor

# Shapes as in a model, with sizes that divide by 4 only where they are sharded.
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "embed.weight": ((24, 5), 0),
    "position.weight": ((7, 5), None),
    "blocks.0.attention.linear_proj.weight": ((5, 16), 1),
    "blocks.0.mlp.linear_fc1.weight": ((2, 12, 5), 1),
    "blocks.0.mlp.linear_fc1.bias": ((2, 12), 1),
    "blocks.0.mlp.linear_fc2.weight": ((5, 12), 1),
    "norm.weight": ((5,), None),
    "scale": ((), None),
}


def random_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: torch.randn(s, generator=generator) for name, (s, _) in SHAPES.items()} for kind in KINDS
    }


def slice_of(name: str, tensor_rank: int, tensor: int) -> tuple[int | None, int, int]:
    """dim, start, stop of a tensor-parallel rank's shard."""
    shape, dim = SHAPES[name]
    if dim is None:
        return None, 0, 0
    width = shape[dim] // tensor
    return dim, tensor_rank * width, (tensor_rank + 1) * width


def flat_ranges(sizes: list[int], data: int, stage: int) -> list[list[tuple[int, int]]]:
    """For each data-parallel rank and parameter the range of the flattened shard that it owns.

    Stage 3 cuts each parameter alike, stages 1 and 2 the parameters laid end to end; 0 leaves all to rank 0.
    """
    total = sum(sizes)
    owned = []
    for rank in range(data):
        ranges, at = [], 0
        for size in sizes:
            if stage == 0:
                start, stop = (0, size) if rank == 0 else (0, 0)
            elif stage == 3:
                width = math.ceil(size / data)
                start, stop = min(rank * width, size), min((rank + 1) * width, size)
            else:
                width = math.ceil(total / data)
                start, stop = (min(max(edge - at, 0), size) for edge in (rank * width, (rank + 1) * width))
            ranges.append((start, stop))
            at += size
        owned.append(ranges)
    return owned


def layout(tensor: int, pipeline: int, data: int, stage: int) -> list[list[tuple[str, Any]]]:
    """Per rank: (name, (dim, start, stop, flat_start, flat_stop)) of everything it owns."""
    names = list(SHAPES)
    ranks = []
    for pipe in range(pipeline):
        mine = names[pipe::pipeline]
        for tensor_rank in range(tensor):
            # What is not sharded is the same on every tensor-parallel rank, and the first owns it.
            held = [name for name in mine if SHAPES[name][1] is not None or tensor_rank == 0]
            cuts = [slice_of(name, tensor_rank, tensor) for name in held]
            sizes = []
            for name, (dim, start, stop) in zip(held, cuts, strict=True):
                shape = list(SHAPES[name][0])
                if dim is not None:
                    shape[dim] = stop - start
                sizes.append(math.prod(shape))
            for ranges in flat_ranges(sizes, data, stage):
                own = [(n, (*c, *r)) for n, c, r in zip(held, cuts, ranges, strict=True)]
                ranks.append(own)
    return ranks


def cut(whole: torch.Tensor, dim: int | None, start: int, stop: int, low: int, high: int) -> torch.Tensor:
    shard = whole if dim is None else whole.narrow(dim, start, stop - start)
    return shard.reshape(-1)[low:high].clone()


def pieces_of(state: State, owned: list[tuple[str, Any]]) -> list[Piece]:
    pieces = []
    for kind, tensors in state.items():
        for name, (dim, start, stop, low, high) in owned:
            data = cut(tensors[name], dim, start, stop, low, high)
            pieces.append(Piece(name, kind, SHAPES[name][0], dim, start, stop, low, data))
    return pieces


class Gather:
    """all_gather_object among threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=30)
        self.values: list[Any] = [None] * world_size

    def of(self, rank: int) -> Callable[[object], list[Any]]:
        def gather(value: object) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return gather


def save_all(
    directory: Path, step: int, ranks: list[list[Piece]], metadata: Any = None, keep: int = 0
) -> list[Any]:
    """Save from as many ranks as there are lists of pieces; each rank's result, or what it raised."""
    gather = Gather(len(ranks))
    outcome: list[Any] = [None] * len(ranks)

    def run(rank: int) -> None:
        try:
            outcome[rank] = save(
                directory,
                step,
                ranks[rank],
                metadata or {},
                rank=rank,
                world_size=len(ranks),
                gather=gather.of(rank),
                keep=keep,
            )
        except BaseException as error:
            outcome[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def save_state(directory: Path, step: int, state: State, *shape: int, keep: int = 0) -> Path:
    """Save `state` as the layout (tensor, pipeline, data, ZeRO stage) would hold it."""
    ranks = [pieces_of(state, owned) for owned in layout(*(shape or (1, 1, 1, 0)))]
    outcome = save_all(directory, step, ranks, {"consumed_samples": step * 10}, keep)
    for result in outcome:
        if isinstance(result, BaseException):
            raise result
    path: Path = outcome[0]
    return path
