"""Reading a checkpoint back, in any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megatron_lite.checkpoint.files import DTYPES_BY_NAME
from megatron_lite.checkpoint.index import HEADER, INDEX, Range, check_size, key_of, read_index
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
from megatron_lite.checkpoint.ranges import crc_of_range, read_values

_READERS = 4  # threads: fast disks, and those over a network, give one reader a part of their speed only
_CHUNK = 1 << 23  # bytes of a large piece that a thread takes
_SHOWN = 8  # faults in a message


class Reader:
    """A complete checkpoint folder, opened: any slice of any parameter, whatever layout wrote it.

    Opening reads index.json and the size of every file (raises CheckpointError where they do not agree);
    only what is asked for is read.

    Args:
        check: compare the checksum of each piece that is read whole. Damage is then noted, not raised, so that ranks
            stay together: call `verify` before using what was read.
        once: kinds that no process of this machine reads a second time, so that the page cache is not for them.
    """

    def __init__(self, path: str | Path, *, check: bool = False, once: Collection[str] = ()) -> None:
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
        self._mapped: dict[str, Any] = {}
        self._ranges: dict[str, dict[str, Range]] = {}
        self._check, self._once = check, frozenset(once)
        self._covered = False
        self._checked: set[tuple[str, str]] = set()
        self._faults: list[str] = []
        self._pool = ThreadPoolExecutor(_READERS)  # which starts no thread before there is work

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files; the reader maps them again where it is used again."""
        self._mapped.clear()

    @property
    def files(self) -> list[str]:
        """The names of the files."""
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

    def verify(
        self,
        kind: str | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[object], list[Any]] = lambda value: [value],
    ) -> None:
        """Read through what is of one kind, or all; DamagedCheckpoint names the pieces damaged or missing.

        Collective, with `gather` as for `save`: what one rank has checked while it read is not read again, the others
        share what is left, and all raise alike.
        """
        if rank == 0:
            try:
                self.check_index()
            except DamagedCheckpoint as error:
                self._faults.append(str(error))
        wanted = [
            (file, key)
            for file, entry in self._files.items()
            for key in self._ranges_of(file)
            if kind is None or key == HEADER or entry.pieces[key].kind == kind
        ]
        own_done = np.packbits([one in self._checked for one in wanted])
        packed = np.array([np.frombuffer(one, np.uint8) for one in gather(own_done.tobytes())])
        done = np.unpackbits(np.bitwise_or.reduce(packed), count=len(wanted)).astype(bool)
        left = [one for one, checked in zip(wanted, done, strict=True) if not checked]
        sizes = np.array([self._ranges[file][key].size for file, key in left], np.int64)
        # Each rank takes what lies next to each other, about as many bytes as the others.
        turns = (sizes.cumsum() - (sizes + 1) // 2) * world_size // max(int(sizes.sum()), 1)
        own = [one for one, turn in zip(left, turns, strict=True) if turn == rank]
        self._faults += filter(None, self._pool.map(lambda one: self._fault_of_range(*one), own))
        # No more of them than are told: those of a lost disk, from each of a thousand ranks, would be gigabytes.
        shown = list(dict.fromkeys(self._faults))[: _SHOWN + 1]
        _raise_on(fault for faults in gather(shown) for fault in faults)

    def check_index(self) -> None:
        """Raise DamagedCheckpoint unless the files together hold every parameter exactly once; they are not read."""
        if not self._covered:
            try:
                check_coverage(piece for entry in self._files.values() for piece in entry.pieces.values())
            except CheckpointError as error:
                raise DamagedCheckpoint(f"{self.path / INDEX}: {error}") from error
            self._covered = True

    def _ranges_of(self, file: str) -> dict[str, Range]:
        if file not in self._ranges:
            self._ranges[file] = self._files[file].ranges()
        return self._ranges[file]

    def _fault_of_range(self, file: str, key: str) -> str | None:
        begin, size, crc = self._ranges_of(file)[key]
        try:
            return None if crc_of_range(self.path / file, begin, size) == crc else self._damage(file, key)
        except OSError as error:
            return f"{self.path / file} cannot be read ({error})"

    def _damage(self, file: str, key: str) -> str:
        return f"{self.path / file} is damaged: {key} does not match its checksum"

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
        target = target.detach()
        if zero_fill:
            target.zero_()
        self._fill(target, name, kind, dim, start, stop, flat_start, zero_fill=zero_fill)

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
            if (span.start, span.stop) == (start, stop) and out.is_contiguous():
                # Cut alike, so that what both hold is one run, however its ends lie in the rows.
                low, high = max(span.flat_start, flat_start), min(span.flat_stop, flat_stop)
                if low < high:
                    part = out[low - flat_start : high - flat_start]
                    self._read(file, piece, low - span.flat_start, part)
                    copied += high - low
                continue
            if span.start < stop and start < span.stop:
                for ours, theirs, box in overlaps(targets, rectangles(shape, axis, span)):
                    part = view(out, ours, box)
                    if part.is_contiguous() and (begin := contiguous(theirs, box)) is not None:
                        self._read(file, piece, begin, part)
                    elif not self._check or self._is_sound(file, piece):
                        with self._reading(file):
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
        if file not in self._mapped:
            self._mapped[file] = safe_open(self.path / file, framework="pt")
        data: torch.Tensor = self._mapped[file].get_tensor(key_of(piece))
        return data

    def _is_sound(self, file: str, piece: Stored) -> bool:
        """Whether a piece is as it was written, and the header that leads to it: a bad sector behind a mapping would
        end the process."""
        for key in (HEADER, key_of(piece)):
            if (file, key) not in self._checked:
                if fault := self._fault_of_range(file, key):
                    self._faults.append(fault)
                    return False
                self._checked.add((file, key))
        return True

    def _read(self, file: str, piece: Stored, begin: int, out: torch.Tensor) -> None:
        """The elements of a piece from `begin` on into `out`, contiguous."""
        key, path, dtype = key_of(piece), self.path / file, DTYPES_BY_NAME[piece.dtype]
        held = self._ranges_of(file)[key]
        at = held.begin + begin * dtype.itemsize
        flat = out.as_strided((out.numel(),), (1,))  # a single element may have any stride
        size = flat.numel() * dtype.itemsize
        with self._reading(file):
            if self._check and size == held.size:
                crc = read_values(path, at, dtype, flat, summed=True, past_cache=piece.kind in self._once)
                if crc != held.crc:
                    self._faults.append(self._damage(file, key))
                self._checked.add((file, key))
                return
            parts = flat.split(_CHUNK // dtype.itemsize)
            begins = range(at, at + size, _CHUNK)
            read = partial(read_values, path, dtype=dtype, summed=False, past_cache=piece.kind in self._once)
            reads = [
                self._pool.submit(read, begin, out=part) for begin, part in zip(begins, parts, strict=True)
            ]
            wait(reads)  # also for the others of one that fails: none may write into `out` any more
            for one in reads:
                one.result()

    @contextlib.contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            fault = f"{self.path / file} cannot be read ({error})"
            if not self._check:
                raise DamagedCheckpoint(f"{fault}; use another step or restore the file") from error
            self._faults.append(fault)

    def _fault(self, name: str, kind: str, fault: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.path / INDEX}: parameter {name} ({kind}) {fault}; {remedy}")


def _raise_on(faults: Iterable[str]) -> None:
    if found := list(dict.fromkeys(faults)):
        more = "; and more" if len(found) > _SHOWN else ""
        remedy = "use another step or restore the file"
        raise DamagedCheckpoint("; ".join(found[:_SHOWN]) + more + f"; {remedy}")


def side_by_side(jobs: Iterable[Sequence[Callable[[], object]]]) -> None:
    """Do several jobs at a time, the reads of each one after the other.

    Fastest in the order in which parameters, and the kinds of each, were written. Raises what the first raises that
    fails.
    """

    def work(job: Sequence[Callable[[], object]]) -> None:
        for read in job:
            read()

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(work, jobs))
