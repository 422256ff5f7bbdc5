"""Samples of fixed length from an indexed dataset, in training order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data import _index
from megatron_lite.data.cache import Arrays, cached, content_stamp
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.rest import Taken, merged, start_after
from megatron_lite.data.sample_index import Packing, Tokens, epoch_order, megatron_order, packed_order

logger = logging.getLogger(__name__)

Order = Literal["epoch", "megatron"]
_FORMAT = 2  # of the cached arrays; raise it when an order or their meaning changes


class SampleDataset(Protocol):
    """What the loader reads: samples in training order."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """[S + 1] token ids: S inputs, and the same moved by one as labels."""
        ...

    def batch(self, samples: Sequence[int] | range) -> NDArray[np.int64]:
        """[len(samples), S + 1]"""
        ...


def reader_of(dataset: SampleDataset) -> _index.Samples | None:
    """What reads the dataset's samples in C++, a whole batch a call; None: only Python can."""
    reader = getattr(dataset, "reader", None)
    return reader if isinstance(reader, _index.Samples) else None


def read_rows(reader: _index.Samples, samples: Sequence[int] | range) -> NDArray[np.int64]:
    """[n, S + 1]: the inputs of these samples and the label of the last one."""
    numbers = np.asarray(samples, dtype=np.int64)
    tokens, labels = (np.empty((len(numbers), reader.length), np.int64) for _ in range(2))
    reader.read(numbers, tokens, labels)
    return np.concatenate([tokens, labels[:, -1:]], axis=1)


class GPTDataset:
    """Samples of `seq_length` + 1 tokens from the sequences `documents` of one indexed dataset.

    num_samples: length of the dataset over as many epochs as that takes ("megatron" rounds up to whole
        epochs); None: what one epoch holds
    packing: "concat": documents joined end to end and cut every `seq_length` tokens; "best_fit": side by side
        in rows, see `packed_order` (labels of other documents and of padding are masked by the loader)
    history: samples of this dataset that a run has taken already; the first sample is the first after them
    name: of the split, for messages
    cache_dir: folder for the index; None: `index_cache` beside the data

    reader: reads samples in C++
    order: the arrays of `sample_index`

    Raises DatasetError where the split is empty or too short for one sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        *,
        order: Order = "epoch",
        packing: Packing = "concat",
        history: Sequence[Taken] = (),
        name: str = "train",
        cache_dir: str | Path | None = None,
    ) -> None:
        self.indexed = indexed
        self.documents = documents
        self.seq_length = seq_length
        self.packing = packing
        self.name = name
        self.tokens = Tokens(indexed.lengths, documents, seed)
        self.num_tokens = self.tokens.total
        self._check(num_samples)
        before = merged(history)
        first = before.pop().samples if before and before[-1][:2] == (seq_length, packing) else 0
        wanted = None if num_samples is None else first + num_samples
        key = {
            "format": _FORMAT,
            "order": order,
            "packing": packing,
            "documents": [documents.start, documents.stop],
            "lengths": content_stamp(indexed.lengths[documents.start : documents.stop]),
            "num_samples": wanted,
            "seq_length": seq_length,
            "seed": seed,
            "history": [list(taken) for taken in before],
        }

        def build() -> Arrays:
            if order == "megatron":
                return megatron_order(self.tokens, wanted, seq_length)
            make = packed_order if packing == "best_fit" else epoch_order
            return make(self.tokens, wanted, seq_length, start_after(self.tokens, before))

        directory = Path(cache_dir) if cache_dir else Path(indexed.prefix).parent / "index_cache"
        arrays = self.order = cached(directory, key, build, f"{name} samples of {indexed.prefix}")
        self.reader = _index.IndexedSamples(
            *(indexed.tokens, indexed.offsets, indexed.lengths),
            *(arrays["documents"], arrays["spans"], arrays["starts"]),
            length=seq_length,
            packed=packing == "best_fit",
            first=first,
        )

        if packing == "best_fit" and len(arrays["starts"]):
            what = "pieces of what is left of the epoch" if before else "documents of an epoch"
            self._log_packing(what, *arrays["report"].tolist())

    def _log_packing(
        self, what: str, documents: int, cut: int, joined: int, tokens: int, padding: int
    ) -> None:
        logger.info(
            "%s of %s: of %d %s packing cuts %d (joined end to end: %d) and pads %.2f%%",
            *(self.name, self.indexed.prefix, documents, what),
            *(cut, joined, 100 * padding / (tokens + padding)),
        )

    def _check(self, num_samples: int | None) -> None:
        where = f"{self.indexed.prefix}: the {self.name} split"
        if len(self.documents) == 0 or self.num_tokens == 0:
            raise DatasetError(
                f"{where} is empty ({len(self.documents):,} of {len(self.indexed):,} sequences, "
                f"{self.num_tokens:,} tokens): give it a larger share in data.split, files of its own in "
                f"data.{self.name}, or more documents"
            )
        if num_samples is None and self.num_tokens <= self.seq_length and self.packing == "concat":
            raise DatasetError(
                f"{where} has {self.num_tokens:,} tokens, too few for one sample of {self.seq_length:,} + 1"
            )

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        return self.batch([sample])[0]

    def batch(self, samples: Sequence[int] | range) -> NDArray[np.int64]:
        try:
            return read_rows(self.reader, samples)
        except IndexError as error:
            raise IndexError(f"{self.name}, {self.indexed.prefix}: {error}") from None
