"""From text files to PREFIX_KEY_document.{bin,idx}: the same bytes for any number of workers."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus.reader import CHUNK_BYTES, Chunk, CorpusError, Problem, parse_chunk, read_chunks
from megatron_lite.data import IndexedDatasetWriter, token_dtype
from megatron_lite.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_CHUNKS_PER_WORKER = 4  # in flight: bounds memory while keeping every worker busy


class KeyStats(NamedTuple):
    """What one JSON key gave: documents with tokens, documents without, tokens (eod included)."""

    written: int
    empty: int
    tokens: int


@dataclass
class EncodeStats:
    """read = written + empty + rejected, for every key."""

    read: int = 0
    rejected: int = 0
    keys: dict[str, KeyStats] = field(default_factory=dict)
    input_bytes: int = 0
    seconds: float = 0.0


class _Encoded(NamedTuple):
    """One chunk's ids, back to back, and lengths (0: an empty document), per key."""

    tokens: list[NDArray[Any]]
    lengths: list[NDArray[np.int64]]
    problems: list[Problem]
    input_bytes: int


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = tuple(keys)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._eod = [tokenizer.eod_id] if append_eod else []

    def __call__(self, chunk: Chunk) -> _Encoded:
        documents, problems = parse_chunk(chunk, self.keys)
        tokens, lengths = [], []
        for number in range(len(self.keys)):
            encoded = self.tokenizer.encode_batch([texts[number] for texts in documents])
            # A text without ids gets no eod either: an empty document, as Megatron writes it.
            ids = [document + self._eod if document else document for document in encoded]
            tokens.append(np.fromiter(chain.from_iterable(ids), dtype=self.dtype))
            lengths.append(np.fromiter(map(len, ids), dtype=np.int64))
        return _Encoded(tokens, lengths, problems, chunk.size)


def encode_corpus(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str,
    *,
    keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    chunk_bytes: int = CHUNK_BYTES,
) -> EncodeStats:
    """Encode `inputs` in order to OUTPUT_PREFIX_KEY_document.{bin,idx} for each key, byte for byte as
    Megatron-core.

    inputs: .jsonl files (any other ending too), .txt files (one document each), either also as .gz
    tokenizer: specification for `load_tokenizer`; each worker loads its own
    append_eod: end each document with the tokenizer's eod
    on_error: "stop" at a bad line, or "skip" it with a warning

    Raises CorpusError (a ValueError) for bad input; then, as after any other exception, nothing is written
    and what stood there before is untouched.
    """
    started = time.monotonic()
    encoder = _Encoder(load_tokenizer(tokenizer), keys, append_eod)
    if append_eod and encoder.tokenizer.eod_id is None:
        raise CorpusError(f"{tokenizer}: has no end-of-document token to append; leave --append-eod out")
    stats = EncodeStats()
    totals = {key: np.zeros(3, dtype=np.int64) for key in keys}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(f"{output_prefix}_{key}_document", encoder.dtype))
            for key in keys
        ]
        chunks = read_chunks(inputs, chunk_bytes)
        if workers > 1:
            results = _in_processes(chunks, workers, (tokenizer, tuple(keys), append_eod))
        else:
            results = (encoder(chunk) for chunk in chunks)
        stack.enter_context(closing(results))
        for result in results:
            _report(result.problems, on_error)
            for key, writer, tokens, lengths in zip(
                keys, writers, result.tokens, result.lengths, strict=True
            ):
                writer.add_documents(tokens, lengths)
                full = int(np.count_nonzero(lengths))
                totals[key] += (full, len(lengths) - full, len(tokens))
            stats.rejected += len(result.problems)
            stats.read += len(result.problems) + len(result.lengths[0])
            stats.input_bytes += result.input_bytes
    stats.keys = {key: KeyStats(*map(int, total)) for key, total in totals.items()}
    stats.seconds = time.monotonic() - started
    return stats


def _report(problems: list[Problem], on_error: str) -> None:
    if problems and on_error == "stop":
        raise CorpusError("\n".join(map(str, problems)))
    for problem in problems:
        logger.warning("%s (left out)", problem)


_worker_encoder: _Encoder


def _start_worker(tokenizer: str, keys: tuple[str, ...], append_eod: bool) -> None:
    global _worker_encoder
    _worker_encoder = _Encoder(load_tokenizer(tokenizer), keys, append_eod)


def _work(chunk: Chunk) -> _Encoded:
    return _worker_encoder(chunk)


def _in_processes(
    chunks: Iterator[Chunk], workers: int, settings: tuple[str, tuple[str, ...], bool]
) -> Generator[_Encoded]:
    """`_Encoder` over the chunks in their order, a bounded number of them in flight."""
    # Spawned, not forked: tokenizer libraries keep threads, which a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, settings)
    flight: deque[Future[_Encoded]] = deque()
    try:
        flight.extend(pool.submit(_work, chunk) for chunk in islice(chunks, workers * _CHUNKS_PER_WORKER))
        while flight:
            yield flight.popleft().result()
            flight.extend(pool.submit(_work, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool:
        raise CorpusError(
            "a worker process ended unexpectedly, often for lack of memory: try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
