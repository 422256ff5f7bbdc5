"""A corpus in pieces for many processes: runs of whole lines of JSON lines files, and whole files of other formats.

Where a piece begins depends on the files alone, so that nothing depends on the number of processes. Workers read their
pieces themselves: only names go to them and only results come back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus.files import (
    expand_inputs,
    format_of,
    open_input,
    reading,
    split_ending,
)
from megatron_lite.corpus.json_lines import fast_parser
from megatron_lite.corpus.reader import Chunk, Problem, parse_records, read_chunks
from megatron_lite.corpus.workers import worker_processes

PIECE_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


class Piece(NamedTuple):
    """All of a file; or of uncompressed JSON lines the lines that begin at bytes `start` up to `stop`."""

    path: str
    start: int = 0
    stop: int | None = None

    @property
    def is_lines(self) -> bool:
        return format_of(self.path) == "jsonl"


class Entry(NamedTuple):
    """One document of a piece. `at`: number of its line (row, record) in the piece, from 0."""

    at: int
    text: bytes  # UTF-8
    line: bytes | None  # of JSON lines, as it stands in the file, with its end
    content: dict[str, Any] | None  # of other formats


def cut(inputs: Sequence[str | Path], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The pieces of all input files in order. Raises CorpusError for what names no file."""
    pieces = []
    for path in expand_inputs(inputs):
        if format_of(path) != "jsonl" or split_ending(path)[1]:
            pieces.append(Piece(path))
            continue
        with reading(path):
            size = os.path.getsize(path)
        edges = [*range(0, size, piece_bytes), size]
        pieces += [Piece(path, *edge) for edge in pairwise(edges)]
    return pieces


def line_groups(piece: Piece) -> Iterator[list[bytes]]:
    """The lines of a piece of JSON lines, with their ends, some at a time. A line belongs where it begins."""
    with reading(piece.path):
        # Iterating over a file with a large buffer is the fastest way to lines that Python has.
        plain = piece.stop is not None
        with open(piece.path, "rb", _BLOCK_BYTES) if plain else open_input(piece.path) as file:
            at = piece.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # the line that began before
            while piece.stop is None or at < piece.stop:
                size = _BLOCK_BYTES if piece.stop is None else min(_BLOCK_BYTES, piece.stop - at - 1)
                # readlines reads on until it has more than `size`; of 0 it would read all.
                lines = file.readlines(size) if size else [file.readline()]
                if not lines or not lines[0]:
                    return
                at += sum(map(len, lines))
                yield lines


def entries(
    piece: Piece, text_key: str, alive: NDArray[np.bool_] | None = None
) -> Iterator[Entry | Problem | int]:
    """The documents and what holds none, in order; last the number of lines (rows, records).

    alive: which lines to read, the others are passed over; None: all. The line of a Problem counts within the piece,
    from 1.
    """
    if not piece.is_lines:
        count = 0
        for chunk in read_chunks([piece.path]):
            for record in parse_records(chunk, text_key):
                count = record.line
                if isinstance(record, Problem):
                    yield record
                elif alive is None or alive[count - 1]:
                    yield Entry(count - 1, record.content[text_key].encode(), None, record.content)
        yield count
        return
    parse = fast_parser(exact=False)
    first = 0
    for lines in line_groups(piece):
        for index, line in enumerate(lines, first):
            if (alive is not None and not alive[index]) or line == b"\n":
                continue
            try:
                yield Entry(index, parse(line)[text_key].encode(), line, None)
            except (ValueError, KeyError, AttributeError):
                yield from problems(piece.path, index, line, text_key)
        first += len(lines)
    yield first


def problems(path: str, index: int, line: bytes, text_key: str) -> Iterator[Problem]:
    """What the reader of all other tools says of a line without a document; nothing if it is blank."""
    for record in parse_records(Chunk(path, index + 1, line, "jsonl"), text_key):
        assert isinstance(record, Problem)
        yield record


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """`worker_processes`; None where `workers` is 1."""
    if workers == 1:
        yield None
        return
    with worker_processes(workers, remedy="fewer workers or a lower --memory") as pool:
        yield pool
