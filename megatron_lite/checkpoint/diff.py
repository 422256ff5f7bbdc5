"""Two sets of weights compared, a block at a time: checkpoints of ours, Hugging Face folders, safetensors files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface import from_huggingface, rules
from megatron_lite.checkpoint.huggingface.folder import (
    CONFIG,
    SHARD_INDEX,
    SINGLE,
    Folder,
    open_weights,
    read_json,
    weight_files,
)
from megatron_lite.checkpoint.latest import resolve
from megatron_lite.checkpoint.layout import KINDS
from megatron_lite.checkpoint.reader import Reader

BLOCK = 1 << 22  # elements in memory at a time
_PACKED = {getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}
_VOCABULARY = ("embed.weight", "head.weight")


class Tensors(Protocol):
    """Named tensors of a few kinds ("weight", "exp_avg", …), read a block at a time."""

    def names(self, kind: str) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str, kind: str) -> torch.dtype: ...

    def blocks(self, name: str, kind: str) -> Iterator[torch.Tensor]:
        """The elements in order, 1-D, `BLOCK` at a time."""


class Own:
    """A step folder of ours."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def names(self, kind: str) -> list[str]:
        return self.reader.names(kind)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(name)

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self.reader.dtype(name, kind)

    def blocks(self, name: str, kind: str) -> Iterator[torch.Tensor]:
        numel = math.prod(self.shape(name))
        for start in range(0, numel, BLOCK):
            yield self.reader.read_flat(name, kind, None, 0, None, start, min(start + BLOCK, numel))
        self.reader.close()  # pages of mapped files count as this process's memory until they are unmapped


class Translated:
    """A Hugging Face folder by our names, the vocabulary without padding; one parameter in memory at a time."""

    def __init__(self, path: Path) -> None:
        model = from_huggingface(read_json(path / CONFIG))
        self._vocabulary = model.vocab_size
        self._folder = Folder(path, model)
        self._rules = {rule.name: rule for rule in rules(model) if rule.held}
        self._folder.check(self._rules.values())

    def names(self, kind: str) -> list[str]:
        return sorted(self._rules) if kind == "weight" else []

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._rules[name].shape
        return (self._vocabulary or shape[0], *shape[1:]) if name in _VOCABULARY else shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self._folder.get(self._rules[name].huggingface[0]).dtype

    def blocks(self, name: str, kind: str) -> Iterator[torch.Tensor]:
        flat = self._folder.parameter(self._rules[name]).reshape(-1)
        yield from flat[: math.prod(self.shape(name))].split(BLOCK)


class Plain:
    """Safetensors files by the names that are in them; those of a folder together."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else weight_files(path)
        self._files: dict[str, Path] = {}
        for file in files:
            with open_weights(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def names(self, kind: str) -> list[str]:
        return sorted(self._files) if kind == "weight" else []

    def shape(self, name: str) -> tuple[int, ...]:
        with open_weights(self._files[name]) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def dtype(self, name: str, kind: str) -> torch.dtype:
        with open_weights(self._files[name]) as opened:
            dtype: torch.dtype = opened.get_tensor(name).dtype
        return dtype

    def blocks(self, name: str, kind: str) -> Iterator[torch.Tensor]:
        with open_weights(self._files[name]) as opened:
            tensor = opened.get_tensor(name)
        if tensor.is_complex() or tensor.dtype in _PACKED:
            raise CheckpointError(
                f"{self._files[name]}: {name} is {tensor.dtype}, which has no one size to compare"
            )
        yield from tensor.reshape(-1).split(BLOCK)


def is_plain(path: Path) -> bool:
    """Whether `path` is a safetensors file, or a folder of them under the names of the Hugging Face Hub."""
    return path.is_file() or (path / SINGLE).is_file() or (path / SHARD_INDEX).is_file()


def open_one(path: Path) -> Tensors:
    """What `path` names: a checkpoint of ours, or safetensors under the names that are in them.

    Raises:
        CheckpointError: there is nothing to read, or it is damaged.
    """
    return Plain(path) if is_plain(path) else Own(Reader(resolve(path)))


def open_two(first: Path, second: Path) -> tuple[Tensors, Tensors]:
    """Two sets of weights by the same names: a Hugging Face folder's are ours unless both are of that kind.

    Raises:
        CheckpointError: there is nothing to read, or it is damaged.
    """
    folders = [is_plain(path) and (path / CONFIG).is_file() for path in (first, second)]
    one, other = (
        Translated(path) if folder and not all(folders) else open_one(path)
        for path, folder in zip((first, second), folders, strict=True)
    )
    return one, other


@dataclass(frozen=True)
class Difference:
    """One parameter of both sets, in one kind.

    Attributes:
        count: elements that are not equal, of `numel` compared; two that are no number are equal.
        absolute: the largest difference of two elements; infinite where one of them is not a finite number, or
            where shapes differ.
        relative: that over the largest element of the first set's (1 where that is 0 and they differ).
        note: why they were not compared, or what of them was not; "" where all was.
    """

    name: str
    kind: str
    numel: int
    count: int
    absolute: float
    relative: float
    note: str = ""

    @property
    def differs(self) -> bool:
        return self.count > 0 or self.absolute > 0


def one_sided(first: Tensors, second: Tensors) -> tuple[list[str], list[str]]:
    """The parameters that only the first set has, and those that only the second has."""
    held = set(first.names("weight")), set(second.names("weight"))
    return sorted(held[0] - held[1]), sorted(held[1] - held[0])


def differences(first: Tensors, second: Tensors) -> Iterator[Difference]:
    """Every parameter that both sets have, by name, in every kind that both have; where shapes differ, once."""
    for kind in KINDS:
        for name in sorted(set(first.names(kind)) & set(second.names(kind))):
            if kind == "weight" or first.shape(name) == second.shape(name):
                yield _compare(first, second, name, kind)


def _compare(first: Tensors, second: Tensors, name: str, kind: str) -> Difference:
    shapes = first.shape(name), second.shape(name)
    numel, note = math.prod(shapes[0]), ""
    if shapes[0] != shapes[1]:
        note = f"shape {list(shapes[0])} and {list(shapes[1])}"
        one_lacks_padding = isinstance(first, Translated) != isinstance(second, Translated)
        if not (one_lacks_padding and name in _VOCABULARY and shapes[0][1:] == shapes[1][1:]):
            return Difference(name, kind, 0, 0, math.inf, math.inf, note)
        rows = [shape[0] for shape in shapes]
        numel, note = min(rows) * math.prod(shapes[0][1:]), f"{min(rows)} of {max(rows)} rows"
    at = count = 0
    absolute = largest = 0.0
    for ours, theirs in zip(first.blocks(name, kind), second.blocks(name, kind), strict=False):
        ours, theirs = ours[: numel - at].double(), theirs[: numel - at].double()
        unequal = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
        count += int(unequal.sum())
        if unequal.any():
            difference = (ours - theirs).abs().nan_to_num(math.inf, math.inf)[unequal]
            absolute = max(absolute, float(difference.max()))
        if ours.numel():
            largest = max(largest, float(ours.abs().nan_to_num(0, 0).max()))
        at += ours.numel()
        if at == numel:
            break
    relative = absolute / largest if largest else float(count > 0)
    return Difference(name, kind, numel, count, absolute, relative, note)


def norm(tensors: Tensors, name: str, kind: str) -> float:
    """The Euclidean norm of a parameter, summed in fp64."""
    return math.sqrt(sum(float(block.double().square().sum()) for block in tensors.blocks(name, kind)))
