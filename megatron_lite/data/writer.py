"""Writing PREFIX.bin and PREFIX.idx in bounded memory; a writer that was killed can be continued."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import CODES, index_header
from megatron_lite.data.sidecar import Checksums, remove_sidecar

_BUFFERED = 1 << 16  # lengths and bounds held before they are written
_BLOCK = 1 << 20  # entries of the index made at once
_LONGEST = (1 << 31) - 1


class WriterState(NamedTuple):
    """How far a writer has come, all of it on disk. `checksum` is the CRC-32 of the .bin so far."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0
    checksum: int = 0


class IndexedDatasetWriter:
    """Write PREFIX.bin and PREFIX.idx, in memory that does not grow with them.

    Tokens, lengths and document bounds go to files beside their place, out of which `close` makes the pair; what
    was there before stays until then. Leaving a `with` block by an exception, or `discard`, leaves nothing behind.
    Counts and checksums are in `state` and, once closed, `checksums`.

    suffix: what the names of unfinished files end in; None: the process's own, so that two writers of one prefix
        do not meet
    state: continue the unfinished files of this suffix from there (a `sync` of the writer that was killed gave it)

    Raises DatasetError for an id that `dtype` cannot hold and for unfinished files shorter than `state` says,
    OSError where the disk refuses.
    """

    checksums: Checksums

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.dtype[Any] | str | type,
        suffix: str | None = None,
        state: WriterState | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DatasetError(f"token ids cannot be written as {self.dtype}; take uint16 or int32")
        self._suffix = f".tmp-{os.getpid()}" if suffix is None else suffix
        self.state = state or WriterState()
        sizes = {
            ".bin": self.state.tokens * self.dtype.itemsize,
            ".lengths": 4 * self.state.sequences,
            ".bounds": 8 * (self.state.documents + 1),
        }
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        try:
            for end, size in sizes.items():
                self._files[end] = _open(self._unfinished(end), None if state is None else size)
        except BaseException:
            self._close_files()
            raise
        self._lengths = array("i")
        self._bounds = array("q", [0] if state is None else [])

    def add_document(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """One document of one sequence; without tokens, a document without a sequence (as Megatron-core
        writes)."""
        if len(tokens):
            self.add_sequence(tokens)
        self.end_document()

    def add_documents(
        self,
        tokens: NDArray[Any],
        lengths: Sequence[int] | NDArray[Any],
        counts: Sequence[int] | NDArray[Any] | None = None,
    ) -> None:
        """Many documents at once: their ids back to back.

        lengths: [S] tokens of each sequence
        counts: [D] sequences of each document; None: one each, or none where the length is 0
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        many = sizes > 0 if counts is None else np.asarray(counts, dtype=np.int64)
        if counts is None:
            sizes = sizes[many]
        if sizes.sum() != len(tokens) or many.sum() != len(sizes) or (sizes < 1).any():
            raise ValueError("the lengths do not add up to the tokens, or the counts to the lengths")
        if sizes.max(initial=0) > _LONGEST:
            raise _too_long(int(sizes.max()))
        self._write_tokens(tokens)
        self._lengths.frombytes(sizes.astype(np.intc).tobytes())
        self._bounds.frombytes((self.state.sequences + np.cumsum(many, dtype=np.int64)).tobytes())
        self._count(len(sizes), len(many))

    def add_sequence(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """One sequence of the document that the next `end_document` ends."""
        if len(tokens) > _LONGEST:
            raise _too_long(len(tokens))
        self._write_tokens(tokens)
        self._lengths.append(len(tokens))
        self._count(1, 0)

    def end_document(self) -> None:
        self._bounds.append(self.state.sequences)
        self._count(0, 1)

    def _count(self, sequences: int, documents: int) -> None:
        state = self.state
        self.state = state._replace(
            sequences=state.sequences + sequences, documents=state.documents + documents
        )
        if len(self._bounds) + len(self._lengths) > _BUFFERED:
            self._flush()

    def _write_tokens(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        values = self._cast(tokens)
        data = np.ascontiguousarray(values).view(np.uint8).data
        self._files[".bin"].write(data)
        self.state = self.state._replace(
            tokens=self.state.tokens + len(values), checksum=zlib.crc32(data, self.state.checksum)
        )

    def _cast(self, tokens: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
        values = np.asarray(tokens)
        if values.dtype == self.dtype or values.size == 0:
            return values.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        if values.dtype.kind not in "iu" or values.min() < limits.min or values.max() > limits.max:
            raise DatasetError(
                f"{self.prefix}: ids from {values.min()} to {values.max()} do not fit {self.dtype}; "
                "is the vocabulary size that of the tokenizer?"
            )
        return values.astype(self.dtype)

    def _flush(self) -> None:
        for end, values, kind in ((".lengths", self._lengths, "<i4"), (".bounds", self._bounds, "<i8")):
            self._files[end].write(np.asarray(values).astype(kind).tobytes())
            del values[:]

    def sync(self) -> WriterState:
        """Everything so far is on disk for good: what another writer can continue from."""
        if self._files:
            self._flush()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self.state

    def close(self) -> None:
        """Write the index and put both files in place."""
        if not self._files:
            return
        try:
            self.finish()
            publish(self.prefix, self._suffix)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Write the index; `publish` is what remains to be done."""
        self.sync()
        self._close_files()
        checksum = 0
        with open(self._unfinished(".idx"), "wb") as file:
            for block in self._index():
                checksum = zlib.crc32(block, checksum)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        self.checksums = Checksums.of(self.state.checksum, checksum)

    def _index(self) -> Iterator[bytes]:
        lengths, bounds = (self._unfinished(end) for end in (".lengths", ".bounds"))
        yield index_header(self.dtype, self.state.sequences, self.state.documents + 1)
        yield from (block.tobytes() for block in _blocks(lengths, "<i4"))
        end = 0
        for block in _blocks(lengths, "<i4"):
            sizes = block.astype("<i8") * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            end = int(ends[-1])
            yield (ends - sizes).tobytes()
        yield from (block.tobytes() for block in _blocks(bounds, "<i8"))

    def discard(self) -> None:
        """Give up: remove what was written so far."""
        self._close_files()
        for end in (".bin", ".idx", ".lengths", ".bounds"):
            self._unfinished(end).unlink(missing_ok=True)

    def _unfinished(self, end: str) -> Path:
        return Path(self.prefix + end + self._suffix)

    def _close_files(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def publish(prefix: str, suffix: str) -> None:
    """Put the finished files of a writer in place. Doing it again, after a crash in the middle, finishes it.

    There is no moment with a new .bin beside an old .idx or sidecar: a crash in between leaves no .idx, which
    opening reports.
    """
    if Path(prefix + ".bin" + suffix).exists():
        Path(prefix + ".idx").unlink(missing_ok=True)
        remove_sidecar(prefix)
    for end in (".bin", ".idx"):
        if Path(prefix + end + suffix).exists():
            os.replace(prefix + end + suffix, prefix + end)
    for end in (".lengths", ".bounds"):
        Path(prefix + end + suffix).unlink(missing_ok=True)


def _open(path: Path, size: int | None) -> BinaryIO:
    """A new file, or where `size` is given the one that is there, cut to so many bytes."""
    if size is None:
        return open(path, "wb")
    try:
        file = open(path, "r+b")  # noqa: SIM115 - closed by the writer
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file, and {size:,} bytes of it are written") from None
    found = file.seek(0, os.SEEK_END)
    if found < size:
        file.close()
        raise DatasetError(f"{path}: {found:,} bytes, and {size:,} of it are written")
    file.truncate(size)
    file.seek(size)
    return file


def _blocks(path: Path, kind: str) -> Iterator[NDArray[Any]]:
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, dtype=kind, count=_BLOCK)):
            yield block


def _too_long(length: int) -> DatasetError:
    return DatasetError(f"a sequence of {length:,} tokens: the format holds 2^31 - 1; divide it")
