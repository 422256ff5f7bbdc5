"""Parquet: rows as dictionaries, a range of rows at a time (pyarrow)."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_lite.corpus.files import CorpusError, reading, require

_MAX_ROWS = (
    1 << 16
)  # of one range: repeated texts may be stored once, so that the bytes on disk promise little
_BUFFER = 1 << 20  # bytes of a column held at once, instead of the whole of it
_PASSES = 4  # row groups that threads are in at once
_EARLY_BYTES = 16 << 20  # of rows that a later range may ask for, in each: threads overtake each other


class Rows(NamedTuple):
    """Rows `start` up to `stop` of one row group; `size`: their bytes before compression, about."""

    group: int
    start: int
    stop: int
    size: int


def row_ranges(path: str, range_bytes: int) -> Iterator[tuple[int, Rows]]:
    """(number of the first row in the file, from 1; rows of about `range_bytes`). Reads the footer alone."""
    with _opened(path) as file:
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        first = 1
        for number, group in enumerate(groups):
            count, size = group.num_rows, max(group.total_byte_size, 1)
            step = min(max(count * range_bytes // size, 1), _MAX_ROWS)
            for start in range(0, count, step):
                stop = min(start + step, count)
                yield first + start, Rows(number, start, stop, size * (stop - start) // count)
            first += count


def read_rows(path: str, rows: Rows, columns: Sequence[str] | None) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a range, each with `columns` (None: all; absent ones are absent); for a row that cannot be read, why.

    A row group can only be decoded from its start, so passes over the last few are kept from range to range, for all
    threads, with the rows that came before they were asked for: ranges may come about in order, or with gaps.
    """
    status = os.stat(path)
    key = (path, status.st_mtime_ns, status.st_size, rows.group, columns and tuple(columns))

    def begin() -> _Pass:
        return _Pass(path, _batches(path, rows, columns))

    with _lock:
        kept = _passes.get(key) or begin()
        _keep(key, kept)
    try:
        found = kept.take(rows.start, rows.stop)
        if found is None:
            kept = begin()
            found = kept.take(rows.start, rows.stop)
            with _lock:
                _keep(key, kept)
    except BaseException:  # it cannot go on
        with _lock:
            _passes.pop(key, None)
        raise
    for batch in found or []:
        yield from _rows_of(batch)


class _Pass:
    """A row group being decoded, by one thread at a time."""

    def __init__(self, path: str, batches: Iterator[Any]) -> None:
        self._path, self._batches = path, batches
        self._lock = threading.Lock()
        self._position = 0  # rows decoded
        self._early: deque[_Early] = deque()

    def take(self, start: int, stop: int) -> list[Any] | None:
        """The rows from `start` up to `stop`, in batches; None where they are gone."""
        with self._lock:
            found = []
            for early in list(self._early):
                part = _overlap(early.first, early.batch, start, stop)
                found.append(part)
                early.left -= len(part)
                if early.left <= 0:
                    self._early.remove(early)
            while self._position < stop:
                batch = next(self._batches, None)
                if batch is None:
                    raise CorpusError(f"{self._path}: cannot be read: fewer rows than its footer says")
                first, self._position = self._position, self._position + len(batch)
                part = _overlap(first, batch, start, stop)
                found.append(part)
                if len(part) < len(batch):
                    self._early.append(_Early(first, batch, len(batch) - len(part)))
            while sum(early.batch.nbytes for early in self._early) > _EARLY_BYTES and len(self._early) > 1:
                self._early.popleft()
        return found if sum(map(len, found)) == stop - start else None


@dataclass(eq=False)
class _Early:
    """A batch, from row `first` on, with so many rows `left` that nobody has asked for."""

    first: int
    batch: Any
    left: int


def _overlap(first: int, batch: Any, start: int, stop: int) -> Any:
    """The rows of a batch, which begins with row `first`, that lie from `start` up to `stop`."""
    low = min(max(start - first, 0), len(batch))
    return batch.slice(low, max(min(stop - first, len(batch)) - low, 0))


_passes: dict[tuple[Any, ...], _Pass] = {}  # the one used last comes last
_lock = threading.Lock()


def _keep(key: tuple[Any, ...], kept: _Pass) -> None:
    _passes.pop(key, None)
    _passes[key] = kept
    while len(_passes) > _PASSES:
        del _passes[next(iter(_passes))]


def _batches(path: str, rows: Rows, columns: Sequence[str] | None) -> Iterator[Any]:
    with _opened(path) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in columns if name in names]
        yield from file.iter_batches(
            batch_size=rows.stop - rows.start, row_groups=[rows.group], columns=wanted, use_threads=False
        )


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(batch)):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield ValueError(f"not UTF-8 at byte {error.start + 1}")


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "a .parquet file")
    arrow_error = require("pyarrow", "a .parquet file").ArrowException
    with reading(path):
        try:
            with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
                yield file
        except (arrow_error, UnicodeDecodeError) as error:  # the second: names of columns
            raise CorpusError(f"{path}: cannot be read: {error}") from None
