"""Reading a checkpoint back, in any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import DTYPES_BY_NAME, READERS, read_range
from megatron_lite.checkpoint.index import INDEX, check_bytes, check_size, key_of, read_index
from megatron_lite.checkpoint.layout import (
    Span,
    Stored,
    check_coverage,
    column_size,
    contiguous,
    overlaps,
    rectangles,
    shard_numel,
    view,
)


class Reader:
    """A complete checkpoint folder, opened: any slice of any parameter, whatever layout wrote it.

    Opening reads index.json and the size of every file (raises CheckpointError where they do not agree);
    the tensors are mapped, and only what is asked for is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = read_index(self.path)
        self.step: int = index.step
        self.metadata: dict[str, Any] = index.metadata
        self._files = {entry.file: entry for entry in index.files}
        _raise_on(fault for entry in index.files if (fault := check_size(self.path, entry)))
        self._pieces: dict[tuple[str, str], list[tuple[str, Stored]]] = {}
        for entry in index.files:
            for piece in entry.pieces.values():
                self._pieces.setdefault((piece.kind, piece.name), []).append((entry.file, piece))
        self._open: dict[str, FileIO] = {}
        self._mapped: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        self._pool = ThreadPoolExecutor(READERS)  # which starts no thread before there is work

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the reader opens them again where it is used again."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._mapped.clear()

    @property
    def files(self) -> list[str]:
        """The names of the files, for ranks that share the work of `verify`."""
        return list(self._files)

    @property
    def kinds(self) -> list[str]:
        """The kinds held: "weight" always, "exp_avg" and "exp_avg_sq" where there is optimizer state."""
        return list(dict.fromkeys(kind for kind, _ in self._pieces))

    def names(self, kind: str = "weight") -> list[str]:
        """The global names of the parameters held in `kind`, sorted."""
        return sorted(name for held, name in self._pieces if held == kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a parameter."""
        return self._held(name, "weight")[0][1].shape

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """The type a parameter is stored in."""
        return DTYPES_BY_NAME[self._held(name, kind)[0][1].dtype]

    def verify(self, files: Iterable[str] | None = None, kind: str | None = None) -> None:
        """Read the files (all, or those named) through, or what is of one kind in them.

        CheckpointError names every piece damaged or missing.
        """
        check_coverage(piece for entry in self._files.values() for piece in entry.pieces.values())
        wanted = self._files if files is None else files
        _raise_on(fault for file in wanted for fault in check_bytes(self.path, self._files[file], kind))

    def read(
        self,
        name: str,
        kind: str = "weight",
        *,
        dim: int | None = None,
        start: int = 0,
        stop: int | None = None,
        zero_fill: bool = False,
    ) -> torch.Tensor:
        """The slice [start, stop) along `dim` of a parameter (all of it where `dim` is None), shaped.

        With `zero_fill` the slice may end beyond the stored parameter, and what is not stored is zero: for a
        vocabulary padded to another size. Raises CheckpointError where the slice is not held.
        """
        shape, dim, start, stop = self._slice(name, dim, start, stop)
        flat_stop = shard_numel(shape, dim, start, stop)
        flat = self.read_flat(name, kind, dim, start, stop, 0, flat_stop, zero_fill=zero_fill)
        if not shape:
            return flat.view(())
        return flat.view(*shape[: dim or 0], stop - start, *shape[(dim or 0) + 1 :])

    def read_flat(
        self,
        name: str,
        kind: str,
        dim: int | None,
        start: int,
        stop: int | None,
        flat_start: int,
        flat_stop: int,
        *,
        zero_fill: bool = False,
    ) -> torch.Tensor:
        """Elements [flat_start, flat_stop) of the flattened slice that `read` would give, 1-D.

        What a ZeRO rank owns; only the rows of the stored pieces that hold it are touched.
        """
        out = torch.zeros(flat_stop - flat_start, dtype=self.dtype(name, kind))
        self._fill(out, name, kind, dim, start, stop, flat_start, zero_fill=zero_fill)
        return out

    def read_into(
        self,
        target: torch.Tensor,
        name: str,
        kind: str,
        dim: int | None,
        start: int,
        stop: int | None,
        flat_start: int,
        *,
        zero_fill: bool = False,
    ) -> None:
        """What `read_flat` gives from `flat_start` on, into a 1-D tensor of any device and type.

        From the disk to where it belongs, where that is contiguous, in host memory and of the stored type.
        """
        if target.dtype == self.dtype(name, kind) and target.device.type == "cpu" and target.is_contiguous():
            if zero_fill:
                target.zero_()
            self._fill(target.detach(), name, kind, dim, start, stop, flat_start, zero_fill=zero_fill)
        else:
            where = (dim, start, stop, flat_start, flat_start + target.numel())
            target.copy_(self.read_flat(name, kind, *where, zero_fill=zero_fill))

    def _fill(
        self,
        out: torch.Tensor,
        name: str,
        kind: str,
        dim: int | None,
        start: int,
        stop: int | None,
        flat_start: int,
        *,
        zero_fill: bool = False,
    ) -> None:
        flat_stop = flat_start + out.numel()
        shape, dim, start, stop = self._slice(name, dim, start, stop)
        size = column_size(shape, dim)
        if not (0 <= start < stop and (stop <= size or zero_fill)):
            remedy = "is the model's configuration that of the checkpoint?"
            raise self._fault(
                name, kind, f"has {size} along dimension {dim or 0}, not {start}:{stop}", remedy
            )
        pieces = self._held(name, kind)
        stored_dim = pieces[0][1].dim
        axis = next((known for known in (dim, stored_dim) if known is not None), 0)
        if stored_dim not in (None, axis):
            remedy = "read it along that dimension"
            raise self._fault(name, kind, f"is sharded along dimension {stored_dim}, not {axis}", remedy)
        if dim is None:
            start, stop = 0, column_size(shape, axis)
        shape = shape or (1,)
        targets = rectangles(shape, axis, Span(start, stop, flat_start, flat_stop))
        copied = 0
        for file, piece in pieces:
            span = piece.span if piece.dim is not None else piece.span._replace(start=0, stop=shape[axis])
            if span.start < stop and start < span.stop:
                for ours, theirs, box in overlaps(targets, rectangles(shape, axis, span)):
                    part = view(out, ours, box)
                    if part.is_contiguous() and (begin := contiguous(theirs, box)) is not None:
                        self._read(file, piece, begin, part)
                    else:
                        part.copy_(view(self._map(file, piece), theirs, box))
                    copied += part.numel()
        if copied != out.numel() and not zero_fill:
            fault = f"holds {copied} of the {out.numel()} elements asked for"
            raise self._fault(name, kind, fault, "is the slice inside the parameter?")

    def _slice(
        self, name: str, dim: int | None, start: int, stop: int | None
    ) -> tuple[tuple[int, ...], int | None, int, int]:
        """The global shape, and the slice with what was left open filled in."""
        shape = self.shape(name)
        if dim is None:
            return shape, None, 0, column_size(shape, None)
        if not 0 <= dim < len(shape):
            raise self._fault(name, "weight", f"has shape {shape}, no dimension {dim}", "check the model")
        return shape, dim, start, column_size(shape, dim) if stop is None else stop

    def _held(self, name: str, kind: str) -> Sequence[tuple[str, Stored]]:
        if (kind, name) not in self._pieces:
            kinds = [held for held in self.kinds if (held, name) in self._pieces]
            fault = f"is there as {', '.join(kinds)} only" if kinds else "is not there"
            raise self._fault(name, kind, fault, "is the model's configuration that of the checkpoint?")
        return self._pieces[kind, name]

    def _map(self, file: str, piece: Stored) -> torch.Tensor:
        """The data of a piece, mapped: bytes are read when they are copied out."""
        with self._reading(file):
            if file not in self._mapped:
                self._mapped[file] = safe_open(self.path / file, framework="pt")
            data: torch.Tensor = self._mapped[file].get_tensor(key_of(piece))
        return data

    def _read(self, file: str, piece: Stored, begin: int, out: torch.Tensor) -> None:
        """The elements of a piece from `begin` on into `out`, contiguous, by several threads."""
        if file not in self._offsets:
            self._offsets[file] = self._files[file].offsets()
        at = self._offsets[file][key_of(piece)] + begin * out.itemsize
        flat = out.as_strided((out.numel(),), (1,))  # a single element may have any stride
        data = flat.view(torch.uint8).numpy().data
        with self._reading(file):
            if file not in self._open:
                self._open[file] = (self.path / file).open("rb", buffering=0)
            read_range(self._open[file].fileno(), at, data, self._pool)

    @contextlib.contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            fault = f"{self.path / file} cannot be read ({error})"
            raise CheckpointError(f"{fault}; use another step or restore the file") from error

    def _fault(self, name: str, kind: str, fault: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.path / INDEX}: parameter {name} ({kind}) {fault}; {remedy}")


def _raise_on(faults: Iterable[str]) -> None:
    if found := list(faults):
        more = f"; and {len(found) - 8} more faults" if len(found) > 8 else ""
        remedy = "use another step or restore the file"
        raise CheckpointError("; ".join(found[:8]) + more + f"; {remedy}")
