"""Checkpoints cut anew, on one machine and in bounded memory: another layout, number of files, type, or weights only.

Any layout reads any other, so that this is for moving files about: one a rank, few or many, half as large.
Two pieces of at most `PIECE` elements are in memory, whatever the size of the model and of its parameters: one is read
while the one before is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import Deferred
from megatron_lite.checkpoint.huggingface import model_config
from megatron_lite.checkpoint.huggingface.exporting import rounded
from megatron_lite.checkpoint.layout import Piece, column_size, shard_numel
from megatron_lite.checkpoint.reader import Reader
from megatron_lite.checkpoint.store import save_files
from megatron_lite.config import ModelConfig
from megatron_lite.model.gpt import gpt_layers
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.parallel.stages import stage_bounds

PIECE = 1 << 25  # elements


class Shard(NamedTuple):
    """What a tensor-parallel rank holds of a parameter: `[start, stop)` along `dim`, all of it where that is None."""

    name: str
    shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return shard_numel(self.shape, self.dim, self.start, self.stop)


def reshard(
    source: Path,
    target: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    weights_only: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the step folder `source` as tensor x pipeline x data files under `target`/checkpoints; its step folder.

    Each data-parallel rank gets an equal part of what its tensor rank and stage hold, as under ZeRO-1. Step and
    training position stay.

    Raises:
        CheckpointError: the source does not say what its model is, and needs to; types that would lose what
            training goes on from; the target holds checkpoints already, or has too little room.
        ValueError: the model does not divide over the layout.
    """
    if dtype is not None and dtype != torch.float32 and not weights_only:
        raise CheckpointError(
            f"{dtype} rounds the fp32 weights that training goes on from; keep weights only"
        )
    with Reader(source) as reader:
        kinds, pieces_of = ["weight"] if weights_only else reader.kinds, _Source(reader)
        files = [
            list(_pieces(pieces_of, kinds, held, rank, data, dtype))
            for held in _shards(reader, tensor, pipeline)
            for rank in range(data)
        ]
        layout = {
            "tensor": tensor,
            "pipeline": pipeline,
            "data": data,
            "written_by": "tools/convert_checkpoint.py",
        }
        return save_files(target, reader.step, files, reader.metadata | {"layout": layout})


def count_files(
    source: Path, largest: int, *, weights_only: bool = False, dtype: torch.dtype | None = None
) -> int:
    """In how many equal files the step folder `source` must be cut so that none has more than `largest` bytes."""
    with Reader(source) as reader:
        kinds = ["weight"] if weights_only else reader.kinds
        total = sum(
            math.prod(reader.shape(name)) * (dtype or reader.dtype(name, kind)).itemsize
            for kind in kinds
            for name in reader.names(kind)
        )
    return max(1, -(-total // largest))


def _shards(reader: Reader, tensor: int, pipeline: int) -> list[list[Shard]]:
    """What each tensor rank of each stage holds, in the order of the ranks."""
    if tensor == pipeline == 1:
        names = reader.names()
        return [
            [
                Shard(name, reader.shape(name), None, 0, column_size(reader.shape(name), None))
                for name in names
            ]
        ]
    model = model_config(reader)
    found = [
        list(_held(model, Mesh(rank=rank, tensor_size=tensor), pipeline, stage))
        for stage in range(pipeline)
        for rank in range(tensor)
    ]
    for shard in itertools.chain(*found):
        if reader.shape(shard.name) != shard.shape:
            stored_as = reader.shape(shard.name)
            raise CheckpointError(
                f"{reader.path}: {shard.name} is {stored_as}, its config.model says {shard.shape}"
            )
    return found


def _held(model: ModelConfig, mesh: Mesh, pipeline: int, stage: int) -> Iterator[Shard]:
    layers = gpt_layers(model, Runtime(mesh, device=torch.device("meta")))
    bounds = stage_bounds(layers, pipeline)
    for layer in layers[bounds[stage] : bounds[stage + 1]]:
        if layer.tied_to:
            continue
        for parameter in layer.build(None).parameters():
            spec = spec_of(parameter)
            if spec.dim is not None or mesh.tensor_rank == 0:
                yield Shard(spec.name, spec.global_shape, spec.dim, spec.start, spec.stop)


def _pieces(
    source: _Source, kinds: list[str], held: list[Shard], rank: int, ranks: int, dtype: torch.dtype | None
) -> Iterator[Piece]:
    """Part `rank` of `ranks` of the shards laid end to end, in pieces that are read when they are written."""
    width = -(-sum(shard.numel for shard in held) // ranks)
    end = 0
    for shard in held:
        begin, end = end, end + shard.numel
        low, high = max(rank * width - begin, 0), min((rank + 1) * width - begin, shard.numel)
        for start in range(low, high, PIECE):
            for kind in kinds:
                data = source.piece(shard, kind, start, min(start + PIECE, high), dtype)
                yield Piece(shard.name, kind, shard.shape, shard.dim, shard.start, shard.stop, start, data)


class _Source:
    """A reader whose pieces take turns in the same two places: new memory for each would cost more than reading it."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._memory: dict[torch.dtype, list[torch.Tensor]] = {}

    def piece(self, shard: Shard, kind: str, start: int, stop: int, dtype: torch.dtype | None) -> Deferred:
        """Elements [start, stop) of a shard; what was read before the last one is gone when they are."""
        stored = self.reader.dtype(shard.name, kind)

        def load() -> torch.Tensor:
            if stored not in self._memory:  # what is not used of it takes none
                self._memory[stored] = [torch.empty(PIECE, dtype=stored) for _ in range(2)]
            self._memory[stored].reverse()
            part = self._memory[stored][0][: stop - start]
            self.reader.read_into(part, shard.name, kind, shard.dim, shard.start, shard.stop, start)
            self.reader.close()  # pages of mapped files count as this process's memory until they are unmapped
            return rounded(part, dtype, shard.name)

        return Deferred(dtype or stored, (stop - start,), load)
