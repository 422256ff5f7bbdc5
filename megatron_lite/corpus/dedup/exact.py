"""Documents, and lines of documents, that stood in the corpus before."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus import _text
from megatron_lite.corpus.dedup.runs import Run, RunWriter, key_array, merge, remove
from megatron_lite.corpus.dedup.state import EXAMPLES, Corpus, Task, Texts, excerpt, with_bases
from megatron_lite.corpus.files import require

_BATCH = 1 << 12  # digests joined at once
_SEPARATORS = {"line": b"\n", "paragraph": b"\n\n"}
_SPACE = re.compile(r"\s+")


class Exact(NamedTuple):
    """Of documents with the same text the first stays.

    normalize: texts count as the same if they differ in case and in white space alone

    Texts are compared by 128 bits of XXH3: among a billion documents the chance that any two different ones are taken
    for equal is about 1e-21.
    """

    normalize: bool = False

    def apply(self, corpus: Corpus) -> dict[str, Any]:
        parts = corpus.scan(partial(_document_keys, self.normalize, corpus.run_limit))
        runs = with_bases(parts, corpus.bases)
        parents = corpus.parents()
        for first, later in merge(runs, corpus.memory):
            parents[later] = first
        remove(runs)
        _text.flatten(parents)
        return {"examples": corpus.drop_children(parents)}


def _document_keys(normalize: bool, limit: int, task: Task, texts: Texts) -> list[Run]:
    digest = _digest()
    writer = RunWriter(task.folder, f"documents-{task.number}", limit)
    digests: list[bytes] = []
    indexes: list[int] = []
    for index, text in texts:
        digests.append(digest(_normalized(text) if normalize else text))
        indexes.append(index)
        if len(digests) == _BATCH:
            writer.add(key_array(b"".join(digests)), np.array(indexes, np.int64))
            digests.clear()
            indexes.clear()
    writer.add(key_array(b"".join(digests)), np.array(indexes, np.int64))
    return writer.finish()


def _normalized(text: bytes) -> bytes:
    return _SPACE.sub(" ", text.decode()).strip().casefold().encode()


def _digest() -> Callable[[bytes], bytes]:
    digest: Callable[[bytes], bytes] = require("xxhash", "deduplication").xxh3_128_digest
    return digest


class Lines(NamedTuple):
    """Lines (or paragraphs, which end at a blank line) that stood in an earlier document are taken out.

    minimum: bytes, without white space around them, that a line must have to be looked at

    Within one document a line may repeat. A document of which nothing but white space is left is dropped.
    """

    unit: Literal["line", "paragraph"] = "line"
    minimum: int = 40

    def apply(self, corpus: Corpus) -> dict[str, Any]:
        # The position of a line counts the distinct lines of all documents.
        parts = corpus.scan(partial(_line_keys, self, corpus.run_limit))
        bases = np.cumsum([0, *(count for _, count in parts)])
        runs = with_bases([runs for runs, _ in parts], bases)
        path = str(corpus.folder / "lines.bin")
        seen = flags(path, int(bases[-1]))
        for _, later in merge(runs, corpus.memory):
            seen[later] = True
        remove(runs)
        lines = int(np.count_nonzero(seen))
        samples = corpus.rewrite(partial(_LineEdit, self, path, bases))
        return {"lines": lines, "examples": [{"removed": excerpt(line)} for line in samples[:EXAMPLES]]}

    def of(self, text: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """(all lines, each without space around it, the distinct ones long enough)."""
        lines = text.split(_SEPARATORS[self.unit])
        bare = list(map(bytes.strip, lines))
        return lines, bare, [line for line in dict.fromkeys(bare) if len(line) >= self.minimum]


def _line_keys(rule: Lines, limit: int, task: Task, texts: Texts) -> tuple[list[Run], int]:
    digest = _digest()
    writer = RunWriter(task.folder, f"lines-{task.number}", limit)
    count = 0
    for _, text in texts:
        keys = key_array(b"".join([digest(line) for line in rule.of(text)[2]]))
        writer.add(keys, np.arange(count, count + len(keys)))
        count += len(keys)
    return writer.finish(), count


class _LineEdit:
    """Goes through the lines of a piece as `_line_keys` did. `samples`: some of what it took out."""

    def __init__(self, rule: Lines, path: str, bases: NDArray[np.int64], task: Task) -> None:
        first, last = bases[task.number : task.number + 2].tolist()
        self._rule, self._seen, self._at = rule, np.fromfile(path, bool, last - first, offset=first), 0
        self.samples: list[bytes] = []

    def __call__(self, at: int, text: bytes) -> bytes:
        lines, bare, looked_at = self._rule.of(text)
        seen = self._seen[self._at : self._at + len(looked_at)]
        self._at += len(looked_at)
        if not seen.any():
            return text
        gone = {line for line, is_seen in zip(looked_at, seen, strict=True) if is_seen}
        if len(self.samples) < EXAMPLES:
            self.samples += sorted(gone)[:EXAMPLES]
        kept = [line for line, plain in zip(lines, bare, strict=True) if plain not in gone]
        return _SEPARATORS[self._rule.unit].join(kept)


def flags(path: str, count: int) -> NDArray[np.bool_]:
    """`count` times False in a mapped file, which takes room on disk only where something is set."""
    with open(path, "wb") as file:
        file.truncate(count)
    return np.memmap(path, bool, "r+") if count else np.zeros(0, bool)
