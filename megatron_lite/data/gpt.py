"""Samples of fixed length from an indexed dataset, in training order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.cache import cached, content_stamp
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.sample_index import epoch_order, megatron_order

Order = Literal["epoch", "megatron"]
_ORDERS = {"epoch": epoch_order, "megatron": megatron_order}
_FORMAT = 1  # of the cached arrays; raise it when an order or their meaning changes


class SampleDataset(Protocol):
    """What the loader reads: samples in training order."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """[S + 1] token ids: S inputs, and the same moved by one as labels."""
        ...

    def batch(self, samples: Sequence[int] | range) -> NDArray[np.int64]:
        """[len(samples), S + 1]"""
        ...


class GPTDataset:
    """Samples of `seq_length` + 1 tokens from the sequences `documents` of one indexed dataset.

    num_samples: length of the dataset over as many epochs as that takes ("megatron" rounds up to whole
        epochs);
        None: what one epoch holds
    name: of the split, for messages
    cache_dir: folder for the index; None: `index_cache` beside the data

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
        name: str = "train",
        cache_dir: str | Path | None = None,
    ) -> None:
        self.indexed = indexed
        self.documents = documents
        self.seq_length = seq_length
        self.name = name
        lengths = indexed.lengths
        split_lengths = lengths[documents.start : documents.stop]
        self.num_tokens = int(split_lengths.sum(dtype=np.int64))
        self._check(num_samples)
        key = {
            "format": _FORMAT,
            "order": order,
            "documents": [documents.start, documents.stop],
            "lengths": content_stamp(split_lengths),
            "num_samples": num_samples,
            "seq_length": seq_length,
            "seed": seed,
        }
        directory = Path(cache_dir) if cache_dir else Path(indexed.prefix).parent / "index_cache"
        arrays = cached(
            directory, key, lambda: _ORDERS[order](lengths, documents, num_samples, seq_length, seed)
        )
        self._stream = arrays["documents"]
        self._starts = arrays["starts"]

    def _check(self, num_samples: int | None) -> None:
        where = f"{self.indexed.prefix}: the {self.name} split"
        if len(self.documents) == 0 or self.num_tokens == 0:
            raise DatasetError(
                f"{where} is empty ({len(self.documents):,} of {len(self.indexed):,} sequences, "
                f"{self.num_tokens:,} tokens): give it a larger share in data.split, files of its own in "
                f"data.{self.name}, or more documents"
            )
        if num_samples is None and self.num_tokens <= self.seq_length:
            raise DatasetError(
                f"{where} has {self.num_tokens:,} tokens, too few for one sample of {self.seq_length:,} + 1"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        tokens = np.empty(self.seq_length + 1, dtype=np.int64)
        self._read(sample, tokens)
        return tokens

    def batch(self, samples: Sequence[int] | range) -> NDArray[np.int64]:
        tokens = np.empty((len(samples), self.seq_length + 1), dtype=np.int64)
        for row, sample in zip(tokens, samples, strict=True):
            self._read(sample, row)
        return tokens

    def _read(self, sample: int, out: NDArray[Any]) -> None:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample:,} of {len(self):,} ({self.name}, {self.indexed.prefix})")
        position, offset = map(int, self._starts[sample])
        done = 0
        while done < len(out):
            document = int(self._stream[position])
            part = self.indexed.get(document, offset, offset + len(out) - done)
            out[done : done + len(part)] = part
            done += len(part)
            position, offset = position + 1, 0
