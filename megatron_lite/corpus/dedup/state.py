"""The corpus between rules: which documents are still in it, where their texts are, and what each rule has done."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus.dedup.pieces import Entry, Piece, cut, entries, line_groups
from megatron_lite.corpus.dedup.runs import Run
from megatron_lite.corpus.files import CorpusError, writing
from megatron_lite.corpus.json_lines import BOM, parse_line
from megatron_lite.corpus.reader import Problem, record_line, reject
from megatron_lite.corpus.workers import in_order

_PER_WORKER = 2  # pieces in flight

KEPT, BLANK, REJECTED = 0, 1, 2  # verdicts; rule number i of a run drops with FIRST_RULE + i
FIRST_RULE = 3
EXAMPLES = 5  # a rule, in the report
EXCERPT = 200  # characters
_BLOCK = 1 << 20  # documents at once
_RUN_BYTES = 160  # of memory a key while a run is sorted in a worker: digests, columns, order, copies

Result = TypeVar("Result")
Texts = Iterator[tuple[int, bytes]]  # (number in the piece, UTF-8) of the documents that are still in


class Task(NamedTuple):
    """What a worker needs to know of piece `number`: where it came from, where its texts are, which of them are in."""

    number: int
    origin: Piece
    source: Piece
    text_key: str
    folder: str
    verdict: str | None  # None: nothing has been read yet
    base: int
    lines: int

    def alive(self) -> NDArray[np.bool_] | None:
        if self.verdict is None:
            return None
        return np.fromfile(self.verdict, np.uint8, self.lines, offset=self.base) == KEPT


class Edit(Protocol):
    """(number in the piece, UTF-8) to new UTF-8, document after document. `samples`: some of what it took out."""

    samples: list[bytes]

    def __call__(self, at: int, text: bytes) -> bytes: ...


class _Rewritten(NamedTuple):
    """Numbers in the piece of documents without text now; of changed ones, and their sizes now."""

    emptied: NDArray[np.int64]
    changed: NDArray[np.int64]
    sizes: NDArray[np.int64]
    samples: list[bytes]


class _Scanned(NamedTuple):
    result: Any
    verdict: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    problems: list[Problem]


def _scan(collect: Callable[[Task, Texts], Any], task: Task) -> _Scanned:
    indexes: list[int] = []
    sizes: list[int] = []
    problems: list[Problem] = []
    count = 0

    def texts() -> Texts:
        nonlocal count
        for entry in entries(task.source, task.text_key, task.alive()):
            if isinstance(entry, Entry):
                if task.verdict is None:
                    indexes.append(entry.at)
                    sizes.append(len(entry.text))
                yield entry.at, entry.text
            elif isinstance(entry, Problem):
                problems.append(entry)
            else:
                count = entry

    result = collect(task, texts())
    if task.verdict is not None:
        _check_count(task, count)
        return _Scanned(result, np.zeros(0, np.uint8), np.zeros(0, np.int64), [])
    verdict = np.full(count, BLANK, np.uint8)
    verdict[indexes] = KEPT
    verdict[[problem.line - 1 for problem in problems]] = REJECTED
    all_sizes = np.zeros(count, np.int64)
    all_sizes[indexes] = sizes
    return _Scanned(result, verdict, all_sizes, problems)


def _check_count(task: Task, count: int) -> None:
    if count != task.lines:
        raise CorpusError(f"{task.origin.path}: has changed while it was read; run again")


class Corpus:
    """Documents have positions, counted over all lines (rows, records) of all inputs: order decides who stays.

    folder: for intermediate files, emptied by whoever made it
    pool: of `workers` processes; None: all is done in this one
    memory: bytes that sorting may take; a byte a document (the verdicts) and eight (the sizes) lie in mapped files
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        folder: Path,
        pool: Executor | None,
        *,
        text_key: str = "text",
        workers: int = 1,
        memory: int = 1 << 30,
        on_error: Literal["stop", "skip"] = "stop",
        piece_bytes: int | None = None,
    ) -> None:
        self.folder, self.text_key, self.workers, self.memory = folder, text_key, workers, memory
        self.on_error = on_error
        self._pool = pool
        self.pieces = cut(inputs) if piece_bytes is None else cut(inputs, piece_bytes)
        self.sources = list(self.pieces)
        self.bases = np.zeros(len(self.pieces) + 1, np.int64)  # position of the first line of each piece
        self._first_lines = np.ones(len(self.pieces), np.int64)  # its number in the file
        self.rule = FIRST_RULE  # the verdict of the rule at work
        self.cut_bytes: Counter[int] = Counter()  # by rule: taken out of documents
        self._rewrites = 0
        self._read = False

    @property
    def run_limit(self) -> int:
        """Keys of one run that fit in a worker's share of the memory."""
        return self.memory // (_RUN_BYTES * self.workers)

    def _verdict_path(self) -> Path:
        return self.folder / "verdict.bin"

    def verdicts(self) -> NDArray[np.uint8]:
        return _mapped(self._verdict_path(), np.uint8)

    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each text."""
        return _mapped(self.folder / "sizes.bin", np.int64)

    def _tasks(self) -> Iterator[Task]:
        verdict = str(self._verdict_path()) if self._read else None
        for number, (origin, source) in enumerate(zip(self.pieces, self.sources, strict=True)):
            base, end = map(int, self.bases[number : number + 2])
            yield Task(number, origin, source, self.text_key, str(self.folder), verdict, base, end - base)

    def _worked(self, work: Callable[[Task], Result]) -> Iterator[tuple[Task, Result]]:
        return in_order(work, self._tasks(), self._pool, self.workers * _PER_WORKER)

    def scan(self, collect: Callable[[Task, Texts], Result]) -> list[Result]:
        """`collect` of each piece, in the workers; it takes all texts and returns something small."""
        results = []
        scanned = self._worked(partial(_scan, collect))
        if self._read:
            return [item.result for _, item in scanned]
        with open(self._verdict_path(), "wb") as verdicts, open(self.folder / "sizes.bin", "wb") as sizes:
            for task, item in scanned:
                self._note_lines(task.number, len(item.verdict))
                self._report(task.number, item.problems)
                verdicts.write(item.verdict.tobytes())
                sizes.write(item.sizes.tobytes())
                results.append(item.result)
        self._read = True
        return results

    def _note_lines(self, number: int, count: int) -> None:
        self.bases[number + 1] = self.bases[number] + count
        if number + 1 < len(self.pieces) and self.pieces[number + 1].start:
            self._first_lines[number + 1] = self._first_lines[number] + count

    def _report(self, number: int, problems: list[Problem]) -> None:
        first = int(self._first_lines[number]) - 1
        found = [problem._replace(line=problem.line + first) for problem in problems]
        reject(found, self.on_error)

    def drop(self, positions: NDArray[np.int64]) -> None:
        """Take documents out by the rule at work."""
        self.verdicts()[positions] = self.rule

    def parents(self) -> NDArray[np.int64]:
        """Every position by itself, in a mapped file: the start of a forest of documents that are like others."""
        path, count = self.folder / "parents.bin", int(self.bases[-1])
        with open(path, "wb") as file:
            for start in range(0, count, _BLOCK):
                np.arange(start, min(start + _BLOCK, count)).tofile(file)
        return _mapped(path, np.int64)

    def drop_children(self, parents: NDArray[np.int64]) -> list[dict[str, str]]:
        """Drop every document whose parent is another; returns the first few such pairs, for the report."""
        pairs: list[tuple[int, int]] = []
        for start in range(0, len(parents), _BLOCK):
            block = np.array(parents[start : start + _BLOCK])
            children = np.flatnonzero(block != np.arange(start, start + len(block)))
            self.drop(children + start)
            few = children[: EXAMPLES - len(pairs)]
            pairs += zip((few + start).tolist(), block[few].tolist(), strict=True)
        texts = self.texts_at(position for pair in pairs for position in pair)
        return [
            {
                "dropped": self.name(dropped),
                "kept": self.name(kept),
                "dropped_text": excerpt(texts[dropped]),
                "kept_text": excerpt(texts[kept]),
            }
            for dropped, kept in pairs
        ]

    def rewrite(self, make_edit: Callable[[Task], Edit]) -> list[bytes]:
        """Change texts: a worker makes an edit for its piece, which then gets its texts in order. A document without
        text afterwards is dropped. Returns the samples of the first pieces."""
        self._rewrites += 1
        work = partial(_rewrite, make_edit, self._rewrites)
        verdicts, sizes = self.verdicts(), self.sizes()
        samples: list[bytes] = []
        for task, done in self._worked(work):
            verdicts[task.base + done.emptied] = self.rule
            self.cut_bytes[self.rule] += int((sizes[task.base + done.changed] - done.sizes).sum())
            sizes[task.base + done.changed] = done.sizes
            samples += done.samples if len(samples) < EXAMPLES else []
            self.sources[task.number] = Piece(_rewritten(task, self._rewrites))
            if self._rewrites > 1:
                Path(_rewritten(task, self._rewrites - 1)).unlink()
        return samples

    def name(self, position: int) -> str:
        """file:line of a document."""
        number = int(np.searchsorted(self.bases, position, side="right")) - 1
        return f"{self.pieces[number].path}:{position - self.bases[number] + self._first_lines[number]}"

    def texts_at(self, positions: Iterable[int]) -> dict[int, bytes]:
        """Texts of a few documents that are still in."""
        found = {}
        wanted: dict[int, list[int]] = {}
        for position in positions:
            number = int(np.searchsorted(self.bases, position, side="right")) - 1
            wanted.setdefault(number, []).append(position)
        for number, group in wanted.items():
            base, end = map(int, self.bases[number : number + 2])
            alive = np.zeros(end - base, bool)
            alive[np.array(group) - base] = True
            for entry in entries(self.sources[number], self.text_key, alive):
                if isinstance(entry, Entry):
                    found[base + entry.at] = entry.text
        return found

    def write(self, output: str | Path) -> None:
        """The documents that are in, as JSON lines; lines that nothing has changed byte for byte."""
        with writing(output) as file:
            for task in self._tasks():
                alive = task.alive()
                assert alive is not None
                if not task.source.is_lines:
                    for entry in entries(task.source, self.text_key, alive):
                        if isinstance(entry, Entry) and entry.content is not None:
                            file.write(record_line(entry.content))
                    continue
                first = 0
                for lines in line_groups(task.source):
                    kept = list(compress(lines, alive[first : first + len(lines)].tolist()))
                    if kept:
                        if first == 0:
                            kept[0] = kept[0].removeprefix(BOM)
                        file.write(with_end(b"".join(kept)))
                    first += len(lines)
                _check_count(task, first)


def _rewritten(task: Task, step: int) -> str:
    return f"{task.folder}/texts-{step}-{task.number}.jsonl"


def _rewrite(make_edit: Callable[[Task], Edit], step: int, task: Task) -> _Rewritten:
    """Writes one line for each line of the piece, blank where no document is in."""
    edit = make_edit(task)
    emptied: list[int] = []
    changed: list[int] = []
    sizes: list[int] = []
    count = written = 0
    with open(_rewritten(task, step), "wb") as file:
        for entry in entries(task.source, task.text_key, task.alive()):
            if isinstance(entry, int):
                count = entry
                file.write(b"\n" * (count - written))
            if not isinstance(entry, Entry):
                continue
            text = edit(entry.at, entry.text)
            file.write(b"\n" * (entry.at - written))
            written = entry.at + 1
            if text != entry.text:
                changed.append(entry.at)
                sizes.append(len(text))
            if text != entry.text and not text.strip():
                emptied.append(entry.at)
                file.write(b"\n")
            elif text == entry.text and entry.line is not None:
                file.write(with_end(entry.line))
            else:
                content = entry.content if entry.line is None else parse_line(entry.line)
                file.write(record_line({**(content or {}), task.text_key: text.decode()}))
    _check_count(task, count)
    arrays = [np.array(part, np.int64) for part in (emptied, changed, sizes)]
    return _Rewritten(arrays[0], arrays[1], arrays[2], edit.samples)


def with_end(lines: bytes) -> bytes:
    """The last line of a file may lack it."""
    return lines if lines.endswith(b"\n") else lines + b"\n"


def _mapped(path: Path, dtype: type[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r+")


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    with writing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def with_bases(parts: Sequence[list[Run]], bases: NDArray[np.int64]) -> list[tuple[int, Run]]:
    """What `runs.merge` takes: the runs of all pieces, each with the first position of its piece."""
    return [(int(base), run) for base, runs in zip(bases, parts, strict=False) for run in runs]


def excerpt(text: bytes) -> str:
    start = text[: 4 * EXCERPT].decode(errors="ignore")[:EXCERPT]
    return start if len(start.encode()) == len(text) else start + "…"
