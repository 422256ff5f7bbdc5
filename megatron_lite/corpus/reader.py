"""Documents out of files: JSON lines, plain text (.txt: one document a file), Parquet, WARC and WET; .gz and .zst.

Reading is in two halves: `read_chunks` cuts files into chunks (cheap, in one process), `parse_chunk` and
`parse_records` turn a chunk into texts or whole records (in the workers). Lines end at "\\n" alone, so a text may hold
any other character.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from megatron_lite.corpus.files import (
    CorpusError,
    Format,
    check_libraries,
    expand_inputs,
    format_of,
    open_input,
    reading,
    writing,
)
from megatron_lite.corpus.json_lines import BOM, fast_dumper, fast_parser, line_blocks, not_utf8, text_under
from megatron_lite.corpus.parquet import Rows, read_rows, row_ranges
from megatron_lite.corpus.warc import Page, page_content, page_runs

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "CorpusError",
    "Problem",
    "Record",
    "RecordWriter",
    "expand_inputs",
    "list_problems",
    "parse_chunk",
    "parse_records",
    "read_chunks",
    "read_records",
    "record_line",
    "reject",
]

SKIP_REMEDY = " (--on-error skip leaves such records out)"

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
_LISTED = 10
_CUT_SHORT = " (the last line, without a line end: is the file cut short?)"


class Problem(NamedTuple):
    """A line (or row, or record) that holds no usable document."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def list_problems(problems: Sequence[Problem]) -> str:
    """The first of them, a line each, and how many more there are."""
    lines = [str(problem) for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"... and {len(problems) - _LISTED:,} more")
    return "\n".join(lines)


def reject(problems: Sequence[Problem], on_error: str, remedy: str = "") -> None:
    """Raise CorpusError with the problems where `on_error` is "stop"; else warn of each that it is left out."""
    if problems and on_error == "stop":
        raise CorpusError(list_problems(problems) + remedy)
    for problem in problems:
        logger.warning("%s (left out)", problem)


class Record(NamedTuple):
    """One document with everything its file says about it.

    line: number of the line, row or record, from 1
    content: the JSON object; the Parquet row; {text_key} of plain text; {text_key, "url", "date"} of WARC and WET
    """

    path: str
    line: int
    content: dict[str, Any]


class Chunk(NamedTuple):
    """A part of one file, picklable, and cheap to make.

    first: number of its first line, row or record, from 1
    data: "jsonl": whole lines; "text": the file; "parquet": which rows, read by whoever parses the chunk; "warc": pages
    """

    path: str
    first: int
    data: bytes | Rows | list[Page]
    format: Format

    @property
    def size(self) -> int:
        """Bytes of input, decompressed."""
        if isinstance(self.data, Rows):
            return self.data.size
        if isinstance(self.data, bytes):
            return len(self.data)
        return sum(len(page.payload) for page in self.data)


def read_chunks(paths: Sequence[str | Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The files (folders and globs too, see `expand_inputs`) in order, in chunks of about `chunk_bytes`.

    Where a chunk ends depends on the files and `chunk_bytes` alone. Memory holds one chunk: more only for a longer line
    or a larger plain text. Raises CorpusError for a file that cannot be read or is cut short.
    """
    files = expand_inputs(paths)
    for path in files:
        check_libraries(path)
    for path, kind in [(path, format_of(path)) for path in files]:
        parts: Iterator[tuple[int, bytes | Rows | list[Page]]]
        if kind == "parquet":
            parts = row_ranges(path, chunk_bytes)
            yield from (Chunk(path, first, rows, kind) for first, rows in parts)
            continue
        with reading(path), open_input(path) as file:
            if kind == "text":
                parts = iter([(1, file.read())])
            elif kind == "warc":
                parts = page_runs(path, file, chunk_bytes)
            else:
                parts = line_blocks(file, chunk_bytes)
            yield from (Chunk(path, first, data, kind) for first, data in parts)


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> tuple[list[list[str]], list[Problem]]:
    """(the texts under `keys` of each good document, the bad ones); blank lines are neither.

    Plain text and web pages have their text under the first key, whatever its name. Raises CorpusError for a damaged
    Parquet file or a library that is not installed.
    """
    documents: list[list[str]] = []
    problems = []
    whole = not isinstance(chunk.data, Rows)  # of those, only the columns asked for are read
    for line, content in _contents(chunk, keys[0], keys):
        try:
            if isinstance(content, ValueError):
                raise content
            documents.append([text_under(content, key, whole) for key in keys])
        except ValueError as error:
            problems.append(Problem(chunk.path, line, str(error)))
    return documents, problems


def parse_records(chunk: Chunk, text_key: str = "text") -> Iterator[Record | Problem]:
    """The records of a chunk; a Problem for one without a text under `text_key`. Numbers are exact."""
    for line, content in _contents(chunk, text_key, None):
        try:
            if isinstance(content, ValueError):
                raise content
            text_under(content, text_key)
            yield Record(chunk.path, line, content)
        except ValueError as error:
            yield Problem(chunk.path, line, str(error))


def read_records(paths: Sequence[str | Path], text_key: str = "text") -> Iterator[Record | Problem]:
    """Every record of the files (folders and globs too), in order and streamed.

    Raises CorpusError for a file that cannot be read."""
    for chunk in read_chunks(paths):
        yield from parse_records(chunk, text_key)


def _contents(
    chunk: Chunk, text_key: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """(line, object in it, or why there is none). columns: all that is wanted (Parquet); None: everything, exactly."""
    data = chunk.data
    if isinstance(data, Rows):
        yield from enumerate(read_rows(chunk.path, data, columns), chunk.first)
    elif isinstance(data, list):
        for page in data:
            try:
                yield page.number, page_content(page, text_key)
            except CorpusError:
                raise
            except ValueError as error:
                yield page.number, error
    elif chunk.format == "text":
        try:
            yield 1, {text_key: _plain_text(data)}
        except ValueError as error:
            yield 1, error
    else:
        yield from _line_contents(data, chunk.first, exact=columns is None)


def _line_contents(data: bytes, first: int, exact: bool) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    parse = fast_parser(exact)
    lines = data.split(b"\n")
    unfinished = first + len(lines) - 1  # the number of a last line without its end
    for number, line in enumerate(lines, first):
        if not line or line.isspace():
            continue
        try:
            yield number, parse(line)
        except ValueError as error:
            if line.removeprefix(BOM).strip():
                cut = number == unfinished and str(error).startswith("not ")
                yield number, ValueError(f"{error}{_CUT_SHORT}") if cut else error


def _plain_text(data: bytes) -> str:
    """UTF-8, without a byte order mark. A NUL is no text: UTF-16 without a mark looks so, and binary files."""
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(data, error)) from None
    if "\0" in text:
        raise ValueError(f"a NUL at byte {data.index(0) + 1}: not UTF-8 text (UTF-16, or a binary file?)")
    return text


def record_line(content: dict[str, Any]) -> bytes:
    """What `RecordWriter` writes for one object, line end included."""
    return _dumper()(content)


_dumper = functools.cache(fast_dumper)


class RecordWriter:
    """JSON lines, one object each, compressed by the ending of `path` (.gz, .zst).

    The file is written beside its place and renamed when the `with` block ends; after an exception nothing is left, and
    what was there before is untouched. The same objects give the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._stack = ExitStack()
        self._file: BinaryIO

    def __enter__(self) -> RecordWriter:
        self._file = self._stack.enter_context(writing(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, content: dict[str, Any]) -> None:
        """Raises CorpusError for a value that JSON cannot hold (bytes out of a Parquet column)."""
        self._file.write(record_line(content))
