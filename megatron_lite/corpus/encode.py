"""From text files to PREFIX_KEY_document.{bin,idx}: the same bytes for any number of workers, interrupted or not."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_lite.corpus.chunk_encoder import ChunkEncoder, Encoded, EncodeSettings
from megatron_lite.corpus.files import CorpusError, check_output, expand_inputs
from megatron_lite.corpus.journal import Journal
from megatron_lite.corpus.progress import Progress
from megatron_lite.corpus.reader import Chunk, Problem, parse_records, reject
from megatron_lite.corpus.shards import WHOLE, Part, Shard, read_parts, write_manifest
from megatron_lite.corpus.workers import in_order, worker_processes
from megatron_lite.data import DatasetError, IndexedDatasetWriter, WriterState, sidecar_of, write_sidecar
from megatron_lite.data.sidecar import Checksums, check_place
from megatron_lite.data.writer import publish
from megatron_lite.tokenizers import GigatokenTokenizer

logger = logging.getLogger(__name__)

_UNFINISHED = ".partial"
_CHUNK_BYTES = 1 << 20  # more would hold more memory, and not be faster
_PER_WORKER = 2  # chunks in flight: bounds memory while keeping every worker busy


class KeyStats(NamedTuple):
    """What one JSON key gave: documents with tokens, documents without, tokens (eod included)."""

    written: int = 0
    empty: int = 0
    tokens: int = 0


@dataclass
class EncodeStats:
    """read = written + empty + rejected, for every key. `seconds` are of all attempts, but for what a kill lost."""

    read: int = 0
    rejected: int = 0
    keys: dict[str, KeyStats] = field(default_factory=dict)
    input_bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Done:
    """What is on disk for good: the state that the journal keeps."""

    file: int = 0
    chunks: int = 0  # of that file
    stats: EncodeStats = field(default_factory=EncodeStats)
    writers: dict[str, WriterState] = field(default_factory=dict)
    checksums: dict[str, Checksums] = field(default_factory=dict)  # of the finished files

    @classmethod
    def of(cls, content: dict[str, Any]) -> _Done:
        stats = EncodeStats(**content["stats"])
        stats.keys = {key: KeyStats(*value) for key, value in stats.keys.items()}
        return cls(
            content["file"],
            content["chunks"],
            stats,
            {key: WriterState(*value) for key, value in content["writers"].items()},
            {key: Checksums(*value) for key, value in content["checksums"].items()},
        )


@dataclass(frozen=True)
class _Run:
    """What stays the same throughout."""

    encoder: ChunkEncoder
    files: list[str]
    sizes: list[int]
    shard: Shard
    datasets: dict[str, str]  # prefix by key
    workers: int
    chunk_bytes: int
    on_error: str
    max_documents: int | None
    journal_seconds: float


def encode_corpus(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    settings: EncodeSettings | str,
    *,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    max_documents: int | None = None,
    shard: Shard = WHOLE,
    restart: bool = False,
    chunk_bytes: int = _CHUNK_BYTES,
    journal_seconds: float = 5.0,
    progress: Progress | None = None,
) -> EncodeStats:
    """Encode `inputs` in order to OUTPUT_PREFIX_KEY_document.{bin,idx,json} for each key, byte for byte as
    Megatron-core.

    inputs: files, folders and globs, see `read_chunks`
    settings: or the tokenizer's specification alone
    workers: threads where gigatoken encodes, else processes
    on_error: "stop" at a bad line, or "skip" it with a warning
    max_documents: take no more than the first so many
    shard: the part of the input to take, see `read_parts`; written to `shard.of(output_prefix)` with a manifest
    restart: start anew where an interrupted run could be continued, or was another one
    journal_seconds: what an interruption loses at most

    Raises ValueError for bad input or settings; then nothing is written, and what stood there before is untouched.
    After any other exception, or kill -9, the same call continues.
    """
    started = time.monotonic()
    if isinstance(settings, str):
        settings = EncodeSettings(settings)
    if len(set(settings.keys)) < len(settings.keys):
        raise CorpusError(f"a key is named twice: {' '.join(settings.keys)}")
    if max_documents is not None and shard.total > 1:
        raise CorpusError(
            "the first documents of a shard are not the first of all: take no shards with a maximum"
        )
    files = expand_inputs(inputs)
    stamps = [os.stat(path) for path in files]
    encoder = ChunkEncoder(settings)
    prefix = shard.of(os.fspath(output_prefix))
    datasets = {key: f"{prefix}_{key}_{settings.level}" for key in settings.keys}
    if os.path.basename(prefix) == "":
        raise CorpusError(f"--output-prefix: {prefix!r} names no file: end it with the beginning of a name")
    for dataset in datasets.values():
        check_output(f"{dataset}.bin", "--output-prefix")
        check_place(dataset)
    sizes = [stamp.st_size for stamp in stamps]
    workers = min(workers, 1 + sum(sizes) // chunk_bytes)  # more would have nothing to do
    # (Workers are not part of it: they may change from one attempt to the next.)
    identity = {
        "inputs": [
            [path, stamp.st_size, stamp.st_mtime_ns] for path, stamp in zip(files, stamps, strict=True)
        ],
        "settings": asdict(settings) | {"on_error": on_error, "max_documents": max_documents},
        "tokenizer": encoder.tokenizer.fingerprint(),
        "gigatoken": isinstance(encoder.tokenizer, GigatokenTokenizer),
        "chunks": chunk_bytes,
    }
    run = _Run(
        encoder, files, sizes, shard, datasets, workers, chunk_bytes, on_error, max_documents, journal_seconds
    )
    with Journal(prefix, identity, restart) as journal:
        done = _resume(journal, settings.keys)
        started -= done.stats.seconds  # of earlier attempts
        if not done.checksums:
            done = _encode(run, done, journal, progress, started)
        _publish(run, done)
        if shard.total > 1:
            write_manifest(os.fspath(output_prefix), shard, _manifest(run, done, identity))
        journal.remove()
    done.stats.seconds = time.monotonic() - started
    return done.stats


def _resume(journal: Journal, keys: Sequence[str]) -> _Done:
    if journal.last is None:
        return _Done(stats=EncodeStats(keys={key: KeyStats() for key in keys}))
    done = _Done.of(journal.last)
    logger.info("continuing an interrupted run after %s documents", f"{done.stats.read:,}")
    return done


def _encode(run: _Run, done: _Done, journal: Journal, progress: Progress | None, started: float) -> _Done:
    """All that is not done yet; the files are then finished, but not in place."""
    done = replace(done, stats=replace(done.stats, keys=dict(done.stats.keys)))
    try:
        writers = {
            key: IndexedDatasetWriter(prefix, run.encoder.dtype, _UNFINISHED, done.writers.get(key))
            for key, prefix in run.datasets.items()
        }
    except DatasetError as error:
        raise CorpusError(f"{error}: changed since the interruption; --restart starts anew") from None
    parts = read_parts(run.files, run.sizes, run.shard, run.chunk_bytes, (done.file, done.chunks))
    if _is_full(run, done):  # killed between the last document and the end
        parts = iter(())
    if progress is not None:
        progress.start(sum(run.sizes) if run.shard.total == 1 else None, done.stats)
    try:
        with ExitStack() as stack:
            if progress is not None:
                stack.callback(progress.close)
            saved = time.monotonic()
            for part, encoded in stack.enter_context(closing(_encoded(run, parts))):
                _write(run, encoded, part, writers, done)
                if progress is not None:
                    progress.update(part.position, done.stats)
                if time.monotonic() - saved >= run.journal_seconds:
                    _save(journal, done, writers, started)
                    saved = time.monotonic()
                if _is_full(run, done):
                    break
            for key, writer in writers.items():
                writer.finish()
                done.checksums[key] = writer.checksums
            _save(journal, done, writers, started)
    except ValueError:  # the input's fault: the same command would not get further
        for writer in writers.values():
            writer.discard()
        journal.remove()
        raise
    return done


def _is_full(run: _Run, done: _Done) -> bool:
    return run.max_documents is not None and done.stats.read - done.stats.rejected >= run.max_documents


def _write(
    run: _Run, encoded: Encoded, part: Part, writers: dict[str, IndexedDatasetWriter], done: _Done
) -> None:
    stats, documents, problems = done.stats, encoded.documents, encoded.problems
    if run.max_documents is not None:
        wanted = run.max_documents - (stats.read - stats.rejected)
        if documents >= wanted:
            documents = wanted
            problems = _problems_before(wanted, part.chunk, problems, run.encoder.settings.keys[0])
    reject(problems, run.on_error)
    for (key, writer), ids in zip(writers.items(), encoded.keys, strict=True):
        ids = ids.first(documents)
        writer.add_documents(*ids)
        written = int(np.count_nonzero(ids.counts))
        before = stats.keys[key]
        stats.keys[key] = KeyStats(
            before.written + written, before.empty + documents - written, before.tokens + len(ids.tokens)
        )
    stats.read += documents + len(problems)
    stats.rejected += len(problems)
    stats.input_bytes += part.chunk.size
    done.file, done.chunks = part.file, part.number + 1


def _problems_before(documents: int, chunk: Chunk, problems: list[Problem], key: str) -> list[Problem]:
    """Those that stand before the last of the first so many documents of the chunk."""
    bad = {problem.line for problem in problems}
    good = (record.line for record in parse_records(chunk, key) if record.line not in bad)
    last = next(islice(good, documents - 1, None))
    return [problem for problem in problems if problem.line < last]


def _save(journal: Journal, done: _Done, writers: dict[str, IndexedDatasetWriter], started: float) -> None:
    done.stats.seconds = time.monotonic() - started
    done.writers = {key: writer.sync() for key, writer in writers.items()}
    journal.add(asdict(done))


def _publish(run: _Run, done: _Done) -> None:
    """Put the finished files in place, with their sidecars. Done again after a crash in between, it completes it."""
    settings, tokenizer = run.encoder.settings, run.encoder.tokenizer
    for key, prefix in run.datasets.items():
        publish(prefix, _UNFINISHED)
        state = done.writers[key]
        sidecar = sidecar_of(
            tokenizer,
            run.encoder.dtype,
            state,
            done.checksums[key],
            append_eod=settings.append_eod,
            special_tokens=settings.special_tokens,
        )
        write_sidecar(prefix, sidecar)


def _manifest(run: _Run, done: _Done, identity: dict[str, Any]) -> dict[str, Any]:
    # Names and sizes: on another machine the same files may lie elsewhere and have other times.
    inputs = [[os.path.basename(path), size] for path, size in zip(run.files, run.sizes, strict=True)]
    settings = {
        key: value for key, value in identity["settings"].items() if key not in ("tokenizer", "encoder")
    }
    return {
        "inputs": inputs,
        "settings": json.loads(
            json.dumps(settings | {"chunks": run.chunk_bytes, "tokenizer": identity["tokenizer"]})
        ),
        "datasets": [f"{key}_{run.encoder.settings.level}" for key in run.datasets],
        "read": done.stats.read,
        "rejected": done.stats.rejected,
        "counts": {key: counts._asdict() for key, counts in done.stats.keys.items()},
        "checksums": {key: checksums._asdict() for key, checksums in done.checksums.items()},
    }


_worker_encoder: ChunkEncoder


def _start_worker(settings: EncodeSettings) -> None:
    global _worker_encoder
    _worker_encoder = ChunkEncoder(settings)


def _work(part: Part) -> Encoded:
    return _worker_encoder(part.chunk)


def _encoded(run: _Run, parts: Iterator[Part]) -> Generator[tuple[Part, Encoded]]:
    """Every part encoded, in their order, a bounded number of them in flight."""

    def encode(part: Part) -> Encoded:
        return run.encoder(part.chunk)

    if isinstance(run.encoder.tokenizer, GigatokenTokenizer):
        # Threads, not processes: memory and start of one. One thread more than encode at a time reads JSON meanwhile.
        run.encoder.tokenizer.allow(run.workers)
        threads = run.workers + 1
        pool = ThreadPoolExecutor(threads)
        try:
            yield from in_order(encode, parts, pool, threads * _PER_WORKER)
        finally:
            pool.shutdown(cancel_futures=True)
    elif run.workers > 1:
        with worker_processes(run.workers, _start_worker, (run.encoder.settings,)) as processes:
            yield from in_order(_work, parts, processes, run.workers * _PER_WORKER)
    else:
        yield from in_order(encode, parts, None, 1)
