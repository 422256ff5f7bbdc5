"""What a dataset is made of: lengths of documents, ids in use, a histogram, and whether it is intact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.sidecar import Checksums, Sidecar, check_sidecars, read_sidecar

_DOCUMENTS = 1 << 20  # looked at once
_IDS = 1 << 22
_MOST_COUNTED = 1 << 24  # larger ids are not counted one by one
_BAR = 40  # characters


class Lengths(NamedTuple):
    """Tokens per document: `values` (ascending, each once) and how many documents have each, both [n] int64."""

    values: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    def percentiles(self, shares: Sequence[float]) -> list[int]:
        """For each share (0 to 100) the smallest length that so many documents do not exceed."""
        ends = np.cumsum(self.counts)
        ranks = np.ceil(np.asarray(shares) / 100 * ends[-1]).clip(1, ends[-1])
        return [int(value) for value in self.values[np.searchsorted(ends, ranks)]]


def document_lengths(indexed: IndexedDataset) -> Lengths:
    """Memory is that of the different lengths, not of the documents."""
    values, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for first in range(0, indexed.num_documents, _DOCUMENTS):
        block = indexed.document_lengths(first, min(first + _DOCUMENTS, indexed.num_documents))
        own, numbers = np.unique(block, return_counts=True)
        values, places = np.unique(np.concatenate([values, own]), return_inverse=True)
        numbers = np.concatenate([counts, numbers])
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, places, numbers)
    return Lengths(values, counts)


class Bin(NamedTuple):
    """Documents of `low` to `high` tokens."""

    low: int
    high: int
    documents: int


def histogram(lengths: Lengths) -> list[Bin]:
    """Bins that double: 0, 1, 2 to 3, 4 to 7, … from the shortest document to the longest."""
    found = []
    for power in range(64):
        low, high = (1 << power) >> 1, max((1 << power) - 1, 0)
        inside = (lengths.values >= low) & (lengths.values <= high)
        found.append(Bin(low, high, int(lengths.counts[inside].sum())))
    full = [number for number, one in enumerate(found) if one.documents]
    return found[full[0] : full[-1] + 1] if full else []


def draw(bins: Sequence[Bin]) -> list[str]:
    """The histogram as lines of text."""
    most = max((one.documents for one in bins), default=0)
    names = [f"{one.low:,}" if one.low == one.high else f"{one.low:,} to {one.high:,}" for one in bins]
    width, digits = max(map(len, names), default=0), len(f"{most:,}")
    return [
        f"{name:>{width}}  {one.documents:>{digits},}  {'█' * -(-one.documents * _BAR // most)}"
        for name, one in zip(names, bins, strict=True)
    ]


class Ids(NamedTuple):
    """The ids in use. frequent: (id, how often), the most frequent first; empty where ids are too large to count."""

    lowest: int
    highest: int
    frequent: list[tuple[int, int]]


def ids_in_use(indexed: IndexedDataset, most: int) -> Ids | None:
    """One pass over the .bin; None where it is empty.

    most: how many of the frequent ids are wanted
    """
    if not indexed.num_tokens:
        return None
    counts: NDArray[np.int64] | None = np.zeros(0, np.int64)
    lowest, highest = [], []
    for first in range(0, indexed.num_tokens, _IDS):
        block = indexed.tokens[first : first + _IDS]
        lowest.append(int(block.min()))
        highest.append(int(block.max()))
        if lowest[-1] < 0 or highest[-1] >= _MOST_COUNTED:
            counts = None
        if counts is not None:
            own = np.bincount(block, minlength=len(counts))
            own[: len(counts)] += counts
            counts = own
    frequent = []
    if counts is not None:
        # Of two that are as frequent the smaller id comes first.
        for number in np.argsort(-counts, kind="stable")[:most]:
            if counts[number]:
                frequent.append((int(number), int(counts[number])))
    return Ids(min(lowest), max(highest), frequent)


def check_ids(indexed: IndexedDataset, ids: Ids | None, vocab_size: int | None) -> None:
    """Raise DatasetError for ids outside the vocabulary (None: not known, negative ids alone are wrong)."""
    if ids is None:
        return
    if ids.lowest < 0 or (vocab_size is not None and ids.highest >= vocab_size):
        allowed = "0 and more" if vocab_size is None else f"0 to {vocab_size - 1:,}"
        raise DatasetError(
            f"{indexed.path}: ids from {ids.lowest:,} to {ids.highest:,}, where a vocabulary has {allowed}: made with "
            "another tokenizer, or damaged; encode the text again"
        )


def check_sidecar(prefix: str, full: bool, fingerprint: str | None = None) -> Sidecar | None:
    """The sidecar, once it agrees with the files: its counts, and where `full` its checksums, which reads them whole.

    Raises DatasetError where they differ, and for another tokenizer than that with this `fingerprint`.
    """
    check_sidecars([prefix], fingerprint)
    sidecar = read_sidecar(prefix)
    if full and sidecar is not None:
        found = Checksums.of_files(prefix)
        for end, said, one in zip(Checksums._fields, sidecar.checksums, found, strict=True):
            if said != one:
                raise DatasetError(
                    f"{prefix}.{end}: its checksum is {one}, {prefix}.json says {said}: it was changed or damaged; "
                    "copy it again from where it is whole, or encode the text again"
                )
    return sidecar
