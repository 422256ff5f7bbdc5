"""Rules one after another over a corpus, into one file of JSON lines and a report."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_lite.corpus.dedup.pieces import worker_pool
from megatron_lite.corpus.dedup.state import KEPT, REJECTED, Corpus, save_json
from megatron_lite.corpus.files import CorpusError, check_output, expand_inputs, refuse_overwriting

_BLOCK = 1 << 20


class Rule(Protocol):
    def apply(self, corpus: Corpus) -> dict[str, Any]:
        """Drop documents and change texts; returns what the report says beside the counts."""

    def _asdict(self) -> dict[str, Any]: ...


def dedup_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    rules: Sequence[Rule],
    *,
    text_key: str = "text",
    workers: int = 1,
    memory: int = 1 << 30,
    on_error: Literal["stop", "skip"] = "stop",
    report: str | Path | None = None,
    piece_bytes: int | None = None,
) -> dict[str, Any]:
    """Apply `rules` in their order to all documents of `inputs`; what stays goes to `output` (.jsonl, .jsonl.gz, .zst).

    Lines that nothing changes are copied byte for byte; other fields pass through. The output is the same for any
    number of workers and any memory. Intermediate files lie beside the output in a hidden folder; that of a killed run
    is cleared by the next one.

    memory: bytes for sorting, shared by the workers; they need about 100 MB each beside it
    report: where to write the report, which is also returned, with the seconds of each rule

    Raises CorpusError for input that cannot be used, and then writes nothing.
    """
    started = time.monotonic()
    if not rules:
        raise CorpusError("no rule is given: nothing to do")
    if workers < 1 or memory < 1:
        raise CorpusError("workers and memory must be at least 1")
    files = expand_inputs(inputs)
    outputs = {"--output": output} | ({} if report is None else {"--report": report})
    refuse_overwriting(files, list(outputs.values()))
    for flag, path in outputs.items():
        check_output(path, flag)
    with workspace(Path(output)) as folder, worker_pool(workers) as pool:
        corpus = Corpus(
            files,
            folder,
            pool,
            text_key=text_key,
            workers=workers,
            memory=memory,
            on_error=on_error,
            piece_bytes=piece_bytes,
        )
        entries: list[dict[str, Any]] = []
        seconds: dict[str, float] = {}
        for rule in rules:
            name = type(rule).__name__.lower()
            began = time.monotonic()
            found = rule.apply(corpus)
            entries.append({"rule": name, "settings": rule._asdict(), **_dropped(corpus), **found})
            seconds[name] = time.monotonic() - began
            corpus.rule += 1
        result = _report(corpus, entries)
        written = folder / "output" / Path(output).name  # where a killed run leaves nothing
        corpus.write(written)
        os.replace(written, output)
        if report is not None:
            save_json(report, result)
    # Not in the file, which is the same for the same input.
    return {**result, "seconds": {**seconds, "total": time.monotonic() - started}}


def _dropped(corpus: Corpus) -> dict[str, int]:
    """Of the rule at work: documents dropped, their bytes, and bytes taken out of documents."""
    documents, size = _count(corpus, corpus.rule)
    return {"documents": documents, "bytes": size, "cut_bytes": corpus.cut_bytes[corpus.rule]}


def _report(corpus: Corpus, rules: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents read = kept + dropped + rejected; bytes of texts read = kept + dropped + cut out."""
    kept, kept_bytes = _count(corpus, KEPT)
    rejected = _count(corpus, REJECTED)[0]
    dropped, cut = sum(rule["documents"] for rule in rules), sum(rule["cut_bytes"] for rule in rules)
    dropped_bytes = sum(rule["bytes"] for rule in rules)
    return {
        "documents": {
            "read": kept + dropped + rejected,
            "kept": kept,
            "dropped": dropped,
            "rejected": rejected,
        },
        "bytes": {
            "read": kept_bytes + dropped_bytes + cut,
            "kept": kept_bytes,
            "dropped": dropped_bytes,
            "cut": cut,
        },
        "rules": rules,
    }


def _count(corpus: Corpus, verdict: int) -> tuple[int, int]:
    """(documents, their bytes) of a verdict."""
    verdicts, sizes = corpus.verdicts(), corpus.sizes()
    documents = size = 0
    for start in range(0, len(verdicts), _BLOCK):
        chosen = verdicts[start : start + _BLOCK] == verdict
        documents += int(np.count_nonzero(chosen))
        size += int(sizes[start : start + _BLOCK][chosen].sum())
    return documents, size


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, removed at the end. What a killed run left there is cleared first; its workers,
    if they still run, have lost their folder and cannot write into the new one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output.parent / f".{output.name}.dedup"
    place.mkdir(exist_ok=True)
    with open(place / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CorpusError(f"{output}: another run is writing it") from None
        for entry in place.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry)
        folder = place / f"run-{os.getpid()}-{time.time_ns()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(place)
