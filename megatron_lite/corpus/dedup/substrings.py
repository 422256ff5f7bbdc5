"""Spans of bytes that stood in the corpus before, wherever they begin (Lee et al. 2022), without a suffix array.

Equal spans of `length` bytes hold equal fingerprints of half that length, since winnowing (Schleimer et al. 2003)
chooses at least one in each by its bytes alone. So a first pass keeps a fingerprint for about every quarter of `length`
bytes and finds those that occur more than once; a second one looks, around these alone, at every span of `length`
bytes. Sorted files on disk hold both. On disk the first takes about half the size of the text (at 200 bytes), the
second 24 bytes for each byte around repeated fingerprints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus import _text
from megatron_lite.corpus.dedup.exact import flags
from megatron_lite.corpus.dedup.runs import Run, RunWriter, merge, remove
from megatron_lite.corpus.dedup.state import EXAMPLES, Corpus, Task, Texts, excerpt, with_bases
from megatron_lite.corpus.files import CorpusError


class Substrings(NamedTuple):
    """Every span of `length` bytes that stood earlier, in this document or another, is cut out, and nothing else.

    Exact, but for two different spans that agree in 122 bits of fingerprint. A span may overlap the earlier one: of a
    long run of one character the first stays. Characters that are cut in part stay. A document of which nothing but
    white space is left is dropped.
    """

    length: int = 200

    def apply(self, corpus: Corpus) -> dict[str, Any]:
        if self.length < 8:
            raise CorpusError("substrings: length is at least 8 bytes")
        sampled = _Flags(
            corpus, "sampled", corpus.scan(partial(_sampled_keys, self.length, corpus.run_limit))
        )
        for first, later in merge(sampled.runs, corpus.memory):
            sampled.flags[first] = True
            sampled.flags[later] = True
        remove(sampled.runs)
        spans = _Flags(
            corpus, "spans", corpus.scan(partial(_span_keys, self.length, corpus.run_limit, sampled.of_piece))
        )
        for _, later in merge(spans.runs, corpus.memory):
            spans.flags[later] = True
        remove(spans.runs)
        removed = corpus.rewrite(partial(_Cut, self.length, sampled.of_piece, spans.of_piece))
        return {"examples": [{"removed": excerpt(text)} for text in removed[:EXAMPLES]]}


class _PieceFlags(NamedTuple):
    """Where the flags of each piece lie in a file."""

    path: str
    bases: NDArray[np.int64]

    def load(self, task: Task) -> NDArray[np.bool_]:
        first, last = self.bases[task.number : task.number + 2].tolist()
        return np.fromfile(self.path, bool, last - first, offset=first)


class _Flags:
    """One flag a key, over all pieces, in a mapped file. parts: (runs, keys) of each piece."""

    def __init__(self, corpus: Corpus, name: str, parts: list[tuple[list[Run], int]]) -> None:
        bases = np.cumsum([0, *(count for _, count in parts)])
        self.runs = with_bases([runs for runs, _ in parts], bases)
        self.of_piece = _PieceFlags(str(Path(corpus.folder, f"{name}.bin")), bases)
        self.flags = flags(self.of_piece.path, int(bases[-1]))


def _fingerprints(text: bytes, length: int) -> tuple[NDArray[np.uint64], NDArray[np.int64], int]:
    """(hashes, positions, bytes of each) of what winnowing chooses: one or more in any span of `length` bytes."""
    width = length // 2
    return *_text.winnow(text, width, length - width + 1), width


def _sampled_keys(length: int, limit: int, task: Task, texts: Texts) -> tuple[list[Run], int]:
    writer = RunWriter(task.folder, f"sampled-{task.number}", limit)
    count = 0
    for _, text in texts:
        hashes = _fingerprints(text, length)[0]
        # One column is enough to find candidates.
        keys = np.column_stack([hashes, np.zeros_like(hashes)])
        writer.add(keys, np.arange(count, count + len(keys)))
        count += len(keys)
    return writer.finish(), count


class _Candidates:
    """The spans of a piece that hold a repeated fingerprint, document after document."""

    def __init__(self, length: int, sampled: _PieceFlags, task: Task) -> None:
        self._length, self._repeated, self._at = length, sampled.load(task), 0

    def next(self, text: bytes) -> NDArray[np.int64]:
        """[n, 2] ranges, first and last + 1, of where such spans begin."""
        _, positions, width = _fingerprints(text, self._length)
        repeated = self._repeated[self._at : self._at + len(positions)]
        self._at += len(positions)
        positions = positions[repeated]
        first = np.maximum(positions + width - self._length, 0)
        last = np.minimum(positions, len(text) - self._length) + 1
        return _joined(first, last)


def _joined(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, 2] ranges without overlap; `first` and `last` ascend."""
    apart = np.flatnonzero(first[1:] > last[:-1])
    if not len(first):
        return np.zeros((0, 2), np.int64)
    return np.column_stack([first[np.r_[0, apart + 1]], last[np.r_[apart, len(last) - 1]]])


def _span_keys(
    length: int, limit: int, sampled: _PieceFlags, task: Task, texts: Texts
) -> tuple[list[Run], int]:
    writer = RunWriter(task.folder, f"spans-{task.number}", limit)
    candidates = _Candidates(length, sampled, task)
    count = 0
    for _, text in texts:
        keys = _text.window_hashes(text, candidates.next(text), length)
        writer.add(keys, np.arange(count, count + len(keys)))
        count += len(keys)
    return writer.finish(), count


class _Cut:
    def __init__(self, length: int, sampled: _PieceFlags, spans: _PieceFlags, task: Task) -> None:
        self._length, self._candidates = length, _Candidates(length, sampled, task)
        self._seen, self._at = spans.load(task), 0
        self.samples: list[bytes] = []

    def __call__(self, at: int, text: bytes) -> bytes:
        ranges = self._candidates.next(text)
        starts = np.concatenate([np.zeros(0, np.int64), *(np.arange(*pair) for pair in ranges.tolist())])
        seen = self._seen[self._at : self._at + len(starts)]
        self._at += len(starts)
        if not seen.any():
            return text
        first = starts[seen]
        removed = [_whole_characters(text, *pair) for pair in _joined(first, first + self._length).tolist()]
        if len(self.samples) < EXAMPLES:
            self.samples += [text[begin:end] for begin, end in removed[:EXAMPLES]]
        edges = [0, *(edge for span in removed for edge in span), len(text)]
        return b"".join(text[begin:end] for begin, end in zip(edges[0::2], edges[1::2], strict=True))


def _whole_characters(text: bytes, begin: int, end: int) -> tuple[int, int]:
    while begin < end and text[begin] & 0xC0 == 0x80:
        begin += 1
    while end > begin and end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return begin, end
