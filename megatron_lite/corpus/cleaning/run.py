"""Cleaning files: the same output bytes for any number of workers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

from megatron_lite.corpus.cleaning.report import Cleaned, CleanReport
from megatron_lite.corpus.cleaning.rules import Outcome, build_rules, clean_document
from megatron_lite.corpus.cleaning.settings import CleaningSettings
from megatron_lite.corpus.files import CorpusError, expand_inputs, refuse_overwriting
from megatron_lite.corpus.reader import (
    SKIP_REMEDY,
    Chunk,
    Problem,
    RecordWriter,
    parse_records,
    read_chunks,
    reject,
)
from megatron_lite.corpus.workers import in_order, worker_processes

_CHUNK_BYTES = 1 << 20
_CHUNKS_PER_WORKER = 4  # in flight: bounds memory while keeping every worker busy


def clean_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: CleaningSettings,
    *,
    text_key: str = "text",
    dropped_output: str | Path | None = None,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    chunk_bytes: int = _CHUNK_BYTES,
) -> CleanReport:
    """Write the records of `inputs` whose text the rules keep to `output`, in order, with their other fields.

    dropped_output: a file for the others, as they came, with the fields "dropped_by" and "dropped_because"
    on_error: "stop" at a record without a usable text, or "skip" it with a warning

    Raises CorpusError for bad input or rules that cannot be built; then, as after any other exception, nothing is
    written and what stood there before is untouched.
    """
    started = time.monotonic()
    if dropped_output is not None and Path(dropped_output).resolve() == Path(output).resolve():
        raise CorpusError(f"{output}: named for the kept and for the dropped documents; take two files")
    arguments = (settings, text_key, dropped_output is not None)
    files = expand_inputs(inputs)
    refuse_overwriting(files, [output, dropped_output])
    cleaner = _Cleaner(*arguments)
    report = CleanReport()
    with ExitStack() as stack:
        writer = stack.enter_context(RecordWriter(output))
        dropped = stack.enter_context(RecordWriter(dropped_output)) if dropped_output is not None else None
        chunks = read_chunks(files, chunk_bytes)
        if workers > 1:
            results = stack.enter_context(closing(_in_processes(chunks, workers, arguments)))
        else:
            results = (cleaner(chunk) for chunk in chunks)
        for result in results:
            problems = [document for document in result if isinstance(document, Problem)]
            reject(problems, on_error, SKIP_REMEDY)
            for problem in problems:
                report.reject(problem)
            for document in result:
                if isinstance(document, Problem):
                    continue
                report.add(document)
                if document.dropped is None:
                    writer.write(document.content)
                elif dropped is not None:
                    dropped.write(document.content)
    report.seconds = time.monotonic() - started
    return report


class _Cleaner:
    """From a chunk of a file to what becomes of each of its records."""

    def __init__(self, settings: CleaningSettings, text_key: str, keep_dropped: bool) -> None:
        self._rules = build_rules(settings)
        self._text_key = text_key
        self._keep_dropped = keep_dropped

    def __call__(self, chunk: Chunk) -> list[Cleaned | Problem]:
        return [
            record if isinstance(record, Problem) else self._clean(record.path, record.line, record.content)
            for record in parse_records(chunk, self._text_key)
        ]

    def _clean(self, path: str, line: int, content: dict[str, Any]) -> Cleaned:
        text: str = content[self._text_key]
        outcome = clean_document(text, self._rules)
        return Cleaned(
            path,
            line,
            bytes_read=len(text.encode()),
            bytes_kept=len((outcome.text or "").encode()),
            dropped=outcome.dropped,
            changes=outcome.changes,
            content=self._content(content, outcome),
        )

    def _content(self, content: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
        if outcome.dropped is None:
            return {**content, self._text_key: outcome.text, **outcome.fields}
        if not self._keep_dropped:
            return {}
        check, reason = outcome.dropped
        return {**content, "dropped_by": check, "dropped_because": reason}


_worker_cleaner: _Cleaner


def _start_worker(*arguments: Any) -> None:
    global _worker_cleaner
    _worker_cleaner = _Cleaner(*arguments)


def _work(chunk: Chunk) -> list[Cleaned | Problem]:
    return _worker_cleaner(chunk)


def _in_processes(
    chunks: Iterator[Chunk], workers: int, arguments: tuple[Any, ...]
) -> Generator[list[Cleaned | Problem]]:
    """`_Cleaner` over the chunks in their order, a bounded number of them in flight."""
    with worker_processes(workers, _start_worker, arguments) as pool:
        yield from (done for _, done in in_order(_work, chunks, pool, workers * _CHUNKS_PER_WORKER))
