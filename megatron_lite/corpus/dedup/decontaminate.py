"""Documents that hold what evaluations ask: n-grams of words in common (GPT-3, Brown et al. 2020, appendix C)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus import _text
from megatron_lite.corpus.dedup.state import EXAMPLES, Corpus, Task, Texts, excerpt
from megatron_lite.corpus.dedup.words import table
from megatron_lite.corpus.files import CorpusError
from megatron_lite.corpus.reader import Problem, read_records

_MATCHES = 1000  # that the report names
_SEARCHED = np.dtype([("hash", "<u8"), ("text", "<i8"), ("begin", "<i8"), ("end", "<i8")])


class Decontaminate(NamedTuple):
    """Documents that share a run of words with an evaluation text are dropped, or the runs are cut out of them.

    files: evaluation texts, in any format that a corpus may have; several fields of them are several runs of this rule
    text_key: the field of their text
    words: of a run; words are compared in lower case and without punctuation
    minimum: an evaluation text of fewer than `words` words is looked for as a whole if it has at least this many,
        else not at all
    cut: "document", or "span": the run and `around` bytes on both sides are taken out; of the pieces left, those below
        `piece` bytes go as well, and a document in more than `pieces` pieces goes as a whole. Pieces are joined by a
        line end.
    """

    files: Sequence[str | Path]
    text_key: str = "text"
    words: int = 13
    minimum: int = 8
    cut: Literal["document", "span"] = "document"
    around: int = 200
    piece: int = 200
    pieces: int = 10

    def apply(self, corpus: Corpus) -> dict[str, Any]:
        if not 1 <= self.minimum <= self.words or min(self.around, self.piece, self.pieces) < 0:
            raise CorpusError(
                "decontaminate: minimum is from 1 to words; around, piece and pieces are not negative"
            )
        folder = corpus.folder / f"evaluations-{corpus.rule}"
        names, short = _prepare(self, folder)
        parts = corpus.scan(partial(_find, folder))
        none = [np.zeros(0, np.int64)]
        positions = np.concatenate(
            none + [base + part.at for base, part in zip(corpus.bases, parts, strict=False)]
        )
        texts = np.concatenate(none + [part.text for part in parts])
        words = [words for part in parts for words in part.words][:_MATCHES]
        documents = np.unique(positions)
        report = {
            "evaluations": len(names),
            "evaluations_too_short": short,
            "evaluations_found": len(np.unique(texts)),
            "documents_matched": len(documents),
            "matches": [
                {"document": corpus.name(position), "evaluation": names[text], "text": run}
                for position, text, run in zip(positions.tolist(), texts.tolist(), words, strict=False)
            ],
            "matches_not_named": len(positions) - len(words),
        }
        if self.cut == "document":
            corpus.drop(documents)
            return report
        np.save(folder / "documents.npy", documents)
        removed = corpus.rewrite(partial(_Cut, self, folder))
        return {**report, "examples": [{"removed": excerpt(text)} for text in removed[:EXAMPLES]]}


class _Found(NamedTuple):
    """Of a piece: document `at` shares a run of words with evaluation `text`; the first run of the first _MATCHES."""

    at: NDArray[np.int64]
    text: NDArray[np.int64]
    words: list[str]


def _prepare(rule: Decontaminate, folder: Path) -> tuple[list[str], int]:
    """Writes what to search for; returns (name of each evaluation text, how many are too short)."""
    folder.mkdir()
    names: list[str] = []
    by_size: dict[int, list[tuple[int, int, str]]] = {}  # words of a run -> (number, start in the file, text)
    short = at = 0
    with open(folder / "texts.bin", "wb") as file:
        for record in read_records(list(rule.files), rule.text_key):
            if isinstance(record, Problem):
                raise CorpusError(f"evaluation text {record}")
            text = record.content[rule.text_key]
            names.append(f"{record.path}:{record.line}")
            size = min(len(_text.words(text, table()).split()), rule.words)
            if size < rule.minimum:
                short += 1
                continue
            by_size.setdefault(size, []).append((len(names) - 1, at, text))
            at += file.write(text.encode())
    for size, texts in by_size.items():
        hashes = np.concatenate([_text.ngram_hashes(text, size, table()) for _, _, text in texts])
        wanted = _text.hash_table(hashes)
        parts = []
        for number, start, text in texts:
            bounds, found = _text.match_ngrams(text, size, table(), wanted)
            part = np.empty(len(found), _SEARCHED)
            part["hash"], part["text"] = found, number
            part["begin"], part["end"] = bounds[:, 0] + start, bounds[:, 1] + start
            parts.append(part)
        all_runs = np.concatenate(parts)
        first = np.unique(all_runs["hash"], return_index=True)[1]
        np.save(folder / f"{size}.runs.npy", all_runs[first])
        np.save(folder / f"{size}.table.npy", wanted)
    return names, short


class _Searcher:
    def __init__(self, folder: Path) -> None:
        texts = folder / "texts.bin"
        self._texts = np.memmap(texts, np.uint8, "r") if texts.stat().st_size else np.zeros(0, np.uint8)
        self._sizes = [
            (size, np.load(folder / f"{size}.table.npy", mmap_mode="r"), np.load(folder / f"{size}.runs.npy"))
            for size in sorted(int(path.name.partition(".")[0]) for path in folder.glob("*.table.npy"))
        ]

    def matches(self, text: bytes) -> Iterator[tuple[int, int, int, str]]:
        """(begin, end, number of the evaluation, words) of each run of words in `text` that is searched for."""
        for size, wanted, runs in self._sizes:
            bounds, hashes = _text.match_ngrams(text, size, table(), wanted)
            for (begin, end), run in zip(
                bounds.tolist(), runs[np.searchsorted(runs["hash"], hashes)], strict=True
            ):
                words = _text.words(text[begin:end], table())
                # Equal hashes of 64 bits are not yet equal words.
                if words == _text.words(self._texts[run["begin"] : run["end"]].tobytes(), table()):
                    yield begin, end, int(run["text"]), words


def _find(folder: Path, task: Task, texts: Texts) -> _Found:
    searcher = _Searcher(folder)
    found: list[tuple[int, int]] = []
    named: list[str] = []
    for at, text in texts:
        seen = set()
        for _, _, number, words in searcher.matches(text):
            if number not in seen:
                seen.add(number)
                found.append((at, number))
                named += [words] if len(named) < _MATCHES else []
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return _Found(pairs[:, 0], pairs[:, 1], named)


class _Cut:
    def __init__(self, rule: Decontaminate, folder: Path, task: Task) -> None:
        documents = np.load(folder / "documents.npy")
        inside = documents[(documents >= task.base) & (documents < task.base + task.lines)]
        self._hit = set((inside - task.base).tolist())
        self._rule, self._searcher = rule, _Searcher(folder)
        self.samples: list[bytes] = []

    def __call__(self, at: int, text: bytes) -> bytes:
        if at not in self._hit:
            return text
        bounds = [(begin, end) for begin, end, _, _ in self._searcher.matches(text)]
        removed = spans(bounds, self._rule.around, text)
        if len(self.samples) < EXAMPLES:
            self.samples += [text[begin:end] for begin, end in removed[:EXAMPLES]]
        return cut_out(text, removed, self._rule.piece, self._rule.pieces)


def spans(bounds: Sequence[tuple[int, int]], around: int, text: bytes) -> list[tuple[int, int]]:
    """`bounds` widened by `around` bytes, to whole characters, and joined where they meet; in order."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(bounds):
        begin, end = max(begin - around, 0), min(end + around, len(text))
        while begin > 0 and text[begin] & 0xC0 == 0x80:
            begin -= 1
        while end < len(text) and text[end] & 0xC0 == 0x80:
            end += 1
        if found and begin <= found[-1][1]:
            begin, end = found[-1][0], max(found.pop()[1], end)
        found.append((begin, end))
    return found


def cut_out(text: bytes, removed: list[tuple[int, int]], piece: int, pieces: int) -> bytes:
    """What is left between the spans; nothing where it is more than `pieces` pieces."""
    edges = [0, *(edge for span in removed for edge in span), len(text)]
    left = [text[begin:end] for begin, end in zip(edges[0::2], edges[1::2], strict=True)]
    left = [part for part in left if len(part) >= max(piece, 1)]
    return b"\n".join(left) if len(left) <= pieces else b""
