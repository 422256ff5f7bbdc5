"""Where a piece of a parameter lies in the whole of it, whatever layout cut it.

A parameter of any shape, cut along `dim` by tensor parallelism, is looked at as a matrix: rows are what comes
before `dim`, columns are `dim` and what comes after. A tensor-parallel shard is a range of columns. ZeRO cuts
the row-major flattened shard into ranges, and each such range is at most three rectangles of the matrix: the
end of a row, some whole rows, the start of a row. Copying between any two layouts is then the intersection of
rectangles, and nothing but the bytes in both is touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import Deferred

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Span(NamedTuple):
    """Elements [flat_start, flat_stop) of the row-major slice [start, stop) along a parameter's dimension."""

    start: int
    stop: int
    flat_start: int
    flat_stop: int


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one global parameter, or of its optimizer state.

    `data` is 1-D: the elements `flat_start ... flat_start + numel` of the row-major flattened shard, and the
    shard is `[start, stop)` along `dim` of a parameter of `global_shape` (the whole of it where `dim` is
    None; `start` and `stop` then mean nothing). `kind` is "weight" (the fp32 master), "exp_avg" or
    "exp_avg_sq".
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int
    flat_start: int
    data: torch.Tensor | Deferred

    @classmethod
    def whole(cls, name: str, kind: str, data: torch.Tensor) -> Piece:
        """The piece that is all of a parameter held unsharded, of any shape."""
        return cls(name, kind, tuple(data.shape), None, 0, 0, 0, data.reshape(-1))


class Stored(NamedTuple):
    """A piece without its data: what the index says of it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dim: int | None  # None where the shard is the whole parameter, however it came to be
    span: Span
    dtype: str  # safetensors' name


def stored(piece: Piece, dtype: str) -> Stored:
    """The index entry of `piece`. Raises CheckpointError where the piece contradicts itself."""
    shape = tuple(int(size) for size in piece.global_shape)
    where = f"piece of {piece.name} ({piece.kind})"
    if piece.kind not in KINDS:
        raise CheckpointError(f"{where}: the kind must be one of {', '.join(KINDS)}")
    if len(piece.data.shape) != 1:
        raise CheckpointError(f"{where}: data must be 1-D, a flat range of the shard; flatten it")
    if piece.dim is not None and not 0 <= piece.dim < len(shape):
        raise CheckpointError(f"{where}: shape {shape} has no dimension {piece.dim}")
    dim = piece.dim
    start, stop = (piece.start, piece.stop) if dim is not None else (0, column_size(shape, None))
    if not 0 <= start < stop <= column_size(shape, dim):
        raise CheckpointError(f"{where}: slice {start}:{stop} is outside dimension {dim} of shape {shape}")
    if (start, stop) == (0, column_size(shape, dim)):
        dim, start, stop = None, 0, column_size(shape, None)  # a slice of everything is no slice
    span = Span(start, stop, piece.flat_start, piece.flat_start + piece.data.numel())
    if span.flat_start < 0 or span.flat_stop > shard_numel(shape, dim, start, stop):
        raise CheckpointError(f"{where}: flat range {span.flat_start}:{span.flat_stop} is outside its shard")
    return Stored(piece.name, piece.kind, shape, dim, span, dtype)


def column_size(shape: Sequence[int], dim: int | None) -> int:
    """Size of the dimension that start and stop count along: dimension 0 where nothing is sharded."""
    return shape[dim or 0] if shape else 1


def shard_numel(shape: Sequence[int], dim: int | None, start: int, stop: int) -> int:
    """Elements of the slice [start, stop) along `dim` of a tensor of `shape`."""
    return math.prod(shape) // column_size(shape, dim) * (stop - start)


def check_coverage(pieces: Iterable[Stored]) -> None:
    """Raise CheckpointError unless every parameter is held exactly once, in every kind that is there."""
    groups: dict[tuple[str, str], list[Stored]] = {}
    for piece in pieces:
        groups.setdefault((piece.kind, piece.name), []).append(piece)
    names = {name for _, name in groups}
    if not names:
        raise CheckpointError("no rank holds any piece: there is nothing to save")
    for kind in {kind for kind, _ in groups} | {"weight"}:
        if absent := sorted(name for name in names if (kind, name) not in groups):
            raise CheckpointError(
                f"no rank holds {kind} of {', '.join(absent[:3])} ({len(absent)} parameters)"
            )
    for (kind, name), group in groups.items():
        if fault := _fault(group):
            raise CheckpointError(f"{name} ({kind}): {fault}; every element must be held by exactly one rank")
    for name in names:
        if len({piece.shape for kind in KINDS for piece in groups.get((kind, name), [])}) > 1:
            raise CheckpointError(f"{name}: its weight and its optimizer state differ in shape")


def _fault(group: list[Stored]) -> str | None:
    """What keeps the pieces of one parameter from tiling it, or None."""
    first = group[0]
    dims = sorted({piece.dim for piece in group if piece.dim is not None})
    for attribute in ("shape", "dtype"):
        if len(values := {getattr(piece, attribute) for piece in group}) > 1:
            return f"pieces differ in {attribute}: {sorted(values)}"
    if len(dims) > 1 or (dims and any(piece.dim is None for piece in group)):
        return f"some pieces are sharded along dimension {dims} and others are not"
    dim = dims[0] if dims else None
    shards: dict[tuple[int, int], list[Span]] = {}
    for piece in group:
        shards.setdefault((piece.span.start, piece.span.stop), []).append(piece.span)
    if fault := _gap(list(shards), column_size(first.shape, dim)):
        return f"slices of dimension {dim or 0} of shape {first.shape}: {fault}"
    for (start, stop), spans in shards.items():
        flat = [(span.flat_start, span.flat_stop) for span in spans]
        if fault := _gap(flat, shard_numel(first.shape, dim, start, stop)):
            return f"elements of slice {start}:{stop}: {fault}"
    return None


def _gap(ranges: list[tuple[int, int]], size: int) -> str | None:
    """What is wrong with `ranges` as a tiling of [0, size)."""
    at = 0
    for start, stop in sorted(ranges):
        if start > at:
            return f"{at}:{start} is missing"
        if start < at:
            return f"{start}:{min(at, stop)} is there twice"
        at = stop
    return f"{at}:{size} is missing" if at < size else None


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of the matrix a parameter is seen as."""

    top: int
    bottom: int
    left: int
    right: int


class Rectangle(NamedTuple):
    """A box that is contiguous in a piece's own flat data, from `offset` on."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int


def rectangles(shape: Sequence[int], dim: int, span: Span) -> list[Rectangle]:
    """The at most three rectangles that `span` is, each contiguous in the span's own data."""
    inner = math.prod(shape[dim + 1 :])
    left, width = span.start * inner, (span.stop - span.start) * inner
    found = []
    at = span.flat_start
    while at < span.flat_stop:
        row, column = divmod(at, width)
        if column or span.flat_stop - at < width:
            rows, columns = 1, min(span.flat_stop - at, width - column)
        else:
            rows, columns = (span.flat_stop - at) // width, width
        box = Rectangle(row, row + rows, left + column, left + column + columns, at - span.flat_start)
        found.append(box)
        at += rows * columns
    return found


def overlaps(
    targets: list[Rectangle], sources: list[Rectangle]
) -> Iterator[tuple[Rectangle, Rectangle, Box]]:
    """Each part of the matrix that both pieces hold, with the rectangle of either that it lies in."""
    for ours, theirs in itertools.product(targets, sources):
        top, bottom = max(ours.top, theirs.top), min(ours.bottom, theirs.bottom)
        left, right = max(ours.left, theirs.left), min(ours.right, theirs.right)
        if top < bottom and left < right:
            yield ours, theirs, Box(top, bottom, left, right)


def view(flat: torch.Tensor, within: Rectangle, part: Box) -> torch.Tensor:
    """`part` of the matrix, as it lies in the flat data of a piece that holds the rectangle `within`."""
    rows, columns = within.bottom - within.top, within.right - within.left
    matrix = flat[within.offset : within.offset + rows * columns].view(rows, columns)
    return matrix[
        part.top - within.top : part.bottom - within.top, part.left - within.left : part.right - within.left
    ]


def contiguous(within: Rectangle, part: Box) -> int | None:
    """Where `part` begins in the flat data of a piece that holds `within`; None where it is not one run of it."""
    width = within.right - within.left
    if part.bottom - part.top > 1 and part.right - part.left < width:
        return None
    return within.offset + (part.top - within.top) * width + part.left - within.left
