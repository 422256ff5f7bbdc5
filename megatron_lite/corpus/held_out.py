"""A corpus as training texts and a held-out share of its documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_lite.corpus.reader import SKIP_REMEDY, Problem, read_records, reject
from megatron_lite.tokenizers.measure import Sample

HELD_OUT_BYTES = 8_000_000


class TrainingTexts:
    """The texts of files without a share of the documents, streamed; those are kept in `held_out`.

    A document is held out by a hash of its text: the same ones in any order of the files, and all copies of a text
    together. At most `HELD_OUT_BYTES` are kept; documents beyond are neither kept nor trained on.

    seen: where nothing is held out, texts from the beginning, which have been trained on
    documents, rejected: so far; rejected ones are not among the documents
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        share: float,
        text_key: str = "text",
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        self._inputs, self._share, self._text_key, self._on_error = inputs, share, text_key, on_error
        self.held_out: list[Sample] = []
        self.seen: list[Sample] = []
        self.documents = 0
        self.rejected = 0

    def __iter__(self) -> Iterator[str]:
        kept = seen = 0
        for sample in self.samples():
            if self._share and is_held_out(sample.text, self._share):
                if kept < HELD_OUT_BYTES:
                    kept += _append(self.held_out, sample, HELD_OUT_BYTES - kept)
                continue
            if seen < HELD_OUT_BYTES and not self.held_out:
                seen += _append(self.seen, sample, HELD_OUT_BYTES - seen)
            yield sample.text

    def samples(self) -> Iterator[Sample]:
        """Every document. Raises CorpusError at a bad one, or leaves it out with a warning."""
        for record in read_records(self._inputs, self._text_key):
            if isinstance(record, Problem):
                reject([record], self._on_error, SKIP_REMEDY)
                self.rejected += 1
                continue
            self.documents += 1
            yield Sample(f"{record.path}:{record.line}", record.content[self._text_key])


def is_held_out(text: str, share: float) -> bool:
    """True for that share of all texts, the same ones always."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def first_samples(texts: TrainingTexts) -> list[Sample]:
    """Documents from the beginning, HELD_OUT_BYTES of them at most; the files are read no further."""
    samples: list[Sample] = []
    kept = 0
    for sample in texts.samples():
        kept += _append(samples, sample, HELD_OUT_BYTES - kept)
        if kept >= HELD_OUT_BYTES:
            break
    return samples


def _append(samples: list[Sample], sample: Sample, room: int) -> int:
    """Keep a sample, cut to `room` bytes; returns its bytes. The empty text says nothing."""
    data = sample.text.encode("utf-8")
    if len(data) > room:
        sample = sample._replace(text=data[:room].decode("utf-8", "ignore"))
    if sample.text:
        samples.append(sample)
    return min(len(data), room)
