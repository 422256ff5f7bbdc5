"""Parquet: rows as dictionaries, a range of rows at a time (pyarrow)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from megatron_lite.corpus.files import CorpusError, reading, require

_MAX_ROWS = (
    1 << 16
)  # of one range: repeated texts may be stored once, so that the bytes on disk promise little
_BUFFER = 1 << 20  # bytes of a column held at once, instead of the whole of it


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

    Memory holds one range. A row group can only be decoded from its start, so the pass over a large one is kept from
    range to range as long as they come in order.
    """
    global _kept
    status = os.stat(path)
    key = (path, status.st_mtime_ns, status.st_size, rows.group, columns and tuple(columns))
    found, _kept = _kept, None
    if found is None or found.key != key or found.position > rows.start:
        found = _Pass(key, _batches(path, rows, columns))
    for batch in found.take(rows.start, rows.stop):
        yield from _rows_of(batch)
    _kept = found


class _Pass:
    """A row group being decoded: the batches to come, and the row they begin with."""

    def __init__(self, key: tuple[Any, ...], batches: Iterator[Any]) -> None:
        self.key = key
        self.position = 0
        self._batches = batches
        self._rest: Any = None

    def take(self, start: int, stop: int) -> Iterator[Any]:
        """The rows from `start` up to `stop`, in batches; those before are passed over."""
        while self.position < stop:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            self._rest = None
            if batch is None:
                raise CorpusError(f"{self.key[0]}: cannot be read: fewer rows than its footer says")
            if self.position + len(batch) > stop:
                self._rest = batch.slice(stop - self.position)
                batch = batch.slice(0, stop - self.position)
            skipped = min(max(start - self.position, 0), len(batch))
            self.position += len(batch)
            if skipped < len(batch):
                yield batch.slice(skipped)


_kept: _Pass | None = None


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
