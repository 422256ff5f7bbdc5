"""Megatron-LM's `torch_dist` checkpoints: torch.distributed.checkpoint's files with Megatron-core's names.

`.metadata` is a pickle that says which chunks each tensor has, and where each is: a range of a `.distcp` file, which
is a file of torch.save by itself. Megatron-core (0.6 to 0.16) adds `common.pt` with the settings, and conventions:
layers of one kind may be stacked along a dimension of their own (`decoder.layers.mlp.linear_fc1.weight`, [layers, …]),
gate and up may be two tensors (`…weight_w`, `…weight_v`), and old optimizer states are flattened a chunk at a time.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.foreign.pickles import load_tensor, read_pickle, read_saved

METADATA = ".metadata"
COMMON = "common.pt"
_STACKED = re.compile(r"(?P<head>.*\bdecoder\.layers)\.(?!\d)(?P<tail>.+)")
_STATE = re.compile(r"optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
_KIND = {"fp32_param": "master", "param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class Chunk(NamedTuple):
    """A box of a tensor, and the range of the file that has it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class Stored(NamedTuple):
    """A tensor of the checkpoint, or one layer of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


class TorchDist:
    """A step's folder of a torch_dist checkpoint, opened; nothing but its table of contents is read.

    Attributes:
        tensors: kind ("weight", "master", "exp_avg", "exp_avg_sq") and name -> the tensors it is, end to end.
        common: what common.pt holds, {} where there is none.

    Raises:
        CheckpointError: its table of contents cannot be read, or is of a form that this release does not know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[tuple[str, str], list[Stored]] = {}
        for name, stored in self._table().items():
            kind = "weight"
            if state := _STATE.fullmatch(name):
                kind, name = _KIND[state[1]], state[2]
            elif name.startswith(("optimizer.", "rng_state")) or "_extra_state" in name:
                continue
            for full, part in _unstack(name, stored):
                self._add(kind, full, part)
        self.common: dict[str, Any] = read_saved(folder / COMMON) if (folder / COMMON).is_file() else {}

    def _add(self, kind: str, name: str, stored: Stored) -> None:
        if name.endswith(("_w", "_v")) and name[:-2].endswith((".weight", ".bias")):
            parts = self.tensors.setdefault((kind, name[:-2]), [])
            parts.insert(0 if name.endswith("_w") else 1, stored)
        else:
            self.tensors[kind, name] = [stored]

    def _table(self) -> dict[str, Stored]:
        path = self.folder / METADATA
        metadata = read_pickle(path)
        try:
            places = {
                (index.fqn, tuple(index.offset)): info
                for index, info in metadata.storage_data.items()
                if getattr(index, "offset", None) is not None
            }
            found = {}
            for name, entry in metadata.state_dict_metadata.items():
                if hasattr(entry, "chunks"):
                    chunks = [_chunk(name, chunk, places, path) for chunk in entry.chunks]
                    found[name] = Stored(tuple(entry.size), _dtype(entry.properties), chunks)
            return found
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            fault = f"is no table of contents of torch.distributed.checkpoint that we know ({error})"
            raise CheckpointError(f"{path} {fault}; save it again with torch 2.1 or later") from error

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.tensors}

    def names(self, kind: str = "weight") -> list[str]:
        return [name for held, name in self.tensors if held == kind]

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self.tensors["weight", name]
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self.tensors[kind, name][0].dtype

    def read(self, name: str, kind: str) -> torch.Tensor:
        """A tensor, 1-D; in memory are it and one of its chunks.

        Raises:
            CheckpointError: a file is damaged, or the chunks are not those of the tensor.
        """
        parts = [self._read(name, part) for part in self.tensors[kind, name]]
        if parts[0].shape[1:] != self.shape(name)[1:] and kind != "weight":
            parts = [_unflatten(parts[0], self.shape(name))]
        return torch.cat([part.reshape(-1) for part in parts])

    def _read(self, name: str, stored: Stored) -> torch.Tensor:
        out, filled = torch.empty(stored.shape, dtype=stored.dtype), 0
        for chunk in stored.chunks:
            path = self.folder / chunk.file
            try:
                with open(path, "rb") as file:
                    file.seek(chunk.begin)
                    data = io.BytesIO(file.read(chunk.length))
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error}); restore it") from error
            found = load_tensor(path, data)
            if not isinstance(found, torch.Tensor) or found.numel() != math.prod(chunk.sizes):
                raise CheckpointError(
                    f"{path}: what is at {chunk.begin} is not the chunk {chunk.sizes} of {name}"
                )
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            out[box] = found.view(chunk.sizes)
            filled += found.numel()
        if filled != out.numel():
            fault = f"{name} has {filled} of its {out.numel()} elements"
            raise CheckpointError(f"{self.folder / METADATA}: {fault}; is the checkpoint whole?")
        return out


def _chunk(name: str, chunk: Any, places: dict[tuple[str, tuple[int, ...]], Any], path: Path) -> Chunk:
    place = places[name, tuple(chunk.offsets)]
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{path}: {name} is compressed; save it without extensions")
    file = place.relative_path
    if Path(file).name != file:
        raise CheckpointError(f'{path} names "{file}", which is not in its folder; do not load it')
    return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, place.offset, place.length)


def _dtype(properties: Any) -> torch.dtype:
    dtype = properties.dtype if hasattr(properties, "dtype") else properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a type")
    return dtype


def _unstack(name: str, stored: Stored) -> list[tuple[str, Stored]]:
    """The layers of a stacked tensor, each by the name it would have alone; what is not stacked as it is."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return [(name, stored)]
    by_layer: dict[int, list[Chunk]] = defaultdict(list)
    for chunk in stored.chunks:
        if chunk.sizes[0] != 1:
            raise CheckpointError(
                f"{name}: a chunk holds {chunk.sizes[0]} layers, where Megatron-core has one"
            )
        by_layer[chunk.offsets[0]].append(chunk._replace(offsets=chunk.offsets[1:], sizes=chunk.sizes[1:]))
    return [
        (f"{match['head']}.{layer}.{match['tail']}", stored._replace(shape=stored.shape[1:], chunks=chunks))
        for layer, chunks in sorted(by_layer.items())
    ]


def _unflatten(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `shape` from [*grid, n]: each chunk of the grid flattened (Megatron-core before 0.14)."""
    grid = flat.shape[:-1]
    if len(grid) != len(shape) or any(size % count for size, count in zip(shape, grid, strict=True)):
        raise CheckpointError(
            f"an optimizer state of shape {tuple(flat.shape)} is not one of a parameter {shape}"
        )
    local = [size // count for size, count in zip(shape, grid, strict=True)]
    order = [axis + part * len(grid) for axis in range(len(grid)) for part in (0, 1)]
    return flat.reshape(*grid, *local).permute(order).reshape(shape)
