"""Text out of files: JSON lines (one object a line) and plain text (.txt: one document a file), also .gz.

Reading is in two halves: `read_chunks` cuts files into runs of raw lines (cheap, in one process),
`parse_line` turns a line into text (in the workers). Lines end at "\\n" alone, so a text may hold any other
character.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class CorpusError(ValueError):
    """Input that cannot be used; the message names file, line and reason."""


class Problem(NamedTuple):
    """A line that holds no usable document."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class Chunk(NamedTuple):
    """Raw lines of one file, the first of them number `first_line` (from 1); or a whole file of plain
    text."""

    path: str
    first_line: int
    lines: list[bytes]
    plain: bool


def read_chunks(paths: Sequence[str | Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The files in order, in chunks of whole lines of at least `chunk_bytes` (the last of a file is smaller).

    Where a chunk ends depends on the files alone. Raises CorpusError for a file that cannot be read.
    """
    for path in map(str, paths):
        try:
            with _open(path) as file:
                if _is_plain(path):
                    yield Chunk(path, 1, [file.read()], True)
                else:
                    yield from _line_chunks(path, file, chunk_bytes)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CorpusError(f"{path}: cannot be read: {reason}") from None


def parse_line(line: bytes, keys: Iterable[str]) -> list[str]:
    """The texts under `keys` of one JSON object. Raises ValueError with the reason where there are none."""
    try:
        content = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}, not an object")
    texts = []
    for key in keys:
        if key not in content:
            raise ValueError(f'no key "{key}"')
        text = content[key]
        if not isinstance(text, str):
            raise ValueError(
                f'"{key}" is {"null" if text is None else f"a {type(text).__name__}"}, not a text'
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f'"{key}" holds half a surrogate pair at character {error.start + 1}') from None
        texts.append(text)
    return texts


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> tuple[list[list[str]], list[Problem]]:
    """(texts of each good line, the bad ones); blank lines are neither."""
    documents: list[list[str]] = []
    problems = []
    for number, line in enumerate(chunk.lines, chunk.first_line):
        try:
            if chunk.plain:
                documents.append([_decode(line)] * len(keys))
            elif line.strip():
                documents.append(parse_line(line, keys))
        except ValueError as error:
            problems.append(Problem(chunk.path, number, str(error)))
    return documents, problems


def _decode(data: bytes) -> str:
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None


def _is_plain(path: str) -> bool:
    return Path(path.removesuffix(".gz")).suffix == ".txt"


def _open(path: str) -> BinaryIO | gzip.GzipFile:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    return open(path, "rb")


def _line_chunks(path: str, file: BinaryIO | gzip.GzipFile, chunk_bytes: int) -> Iterator[Chunk]:
    first = 1
    while lines := file.readlines(chunk_bytes):
        yield Chunk(path, first, lines, False)
        first += len(lines)
