"""Which tokens each training sample holds, in training order.

Sequences ("documents" below, as Megatron's GPTDataset calls them) are put in some order and joined to one
stream; sample k is tokens k*S .. k*S + S of it (S inputs and one more for the last label). An order is
therefore two arrays:

documents [D] int32/int64: sequence numbers in stream order
starts [K, 2] int32/int64: for sample i of the training order, (position in `documents`, token offset) of its
    start
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.config import split_sizes
from megatron_lite.data import _index
from megatron_lite.data.cache import Arrays
from megatron_lite.data.errors import DatasetError

_INT32_MAX = 2**31 - 1
_DOCUMENTS, _SAMPLES = 0, 1  # what a shuffle of the epoch order is for


def epoch_order(
    lengths: NDArray[np.int32], documents: range, num_samples: int | None, seq_length: int, seed: int
) -> Arrays:
    """Every document once per epoch, each epoch in an order of its own; samples are shuffled within their
    epoch.

    A sample belongs to the epoch of its first token. All is a function of (seed, epoch) alone, so asking for
    more samples only adds to the end. Memory beyond the result is that of one epoch.

    lengths: tokens of every sequence of the file; documents: those that belong to the split
    num_samples: samples wanted, over as many epochs as they take; None: those that fit into one epoch
    """
    total = _total(lengths, documents)
    wanted = (total - 1) // seq_length if num_samples is None else num_samples
    starts: list[NDArray[Any]] = []
    stream: list[NDArray[Any]] = []
    epoch = 0
    done = 0
    while done < wanted:
        order = _shuffled_documents(documents, seed, epoch)
        first = epoch * total  # the epoch's first token in the whole stream
        begin = -(-first // seq_length)
        end = wanted if num_samples is None else -(-(first + total) // seq_length)
        rows = _index.build_sample_index(lengths, order, begin * seq_length - first, seq_length, end - begin)
        samples = _arange(end - begin, _INT32_MAX)
        _index.shuffle(samples, seed, epoch, _SAMPLES)
        rows = rows[samples[: wanted - done]]
        if (epoch + 1) * len(order) > _INT32_MAX:
            rows = rows.astype(np.int64)
        rows[:, 0] += epoch * len(order)
        starts.append(rows)
        stream.append(order)
        done += len(rows)
        epoch += 1
    missing = -(-epoch * total // seq_length) * seq_length + 1 - epoch * total
    if num_samples is not None and done:
        stream += _head(lengths, documents, seed, epoch, missing, total)
    rows = np.concatenate(starts) if starts else np.zeros((0, 2), np.int32)
    return {"documents": np.concatenate(stream) if stream else np.zeros(0, np.int32), "starts": rows}


def _head(
    lengths: NDArray[np.int32], documents: range, seed: int, epoch: int, tokens: int, total: int
) -> list[NDArray[Any]]:
    """The first documents of `epoch` (and of those after it) that hold `tokens` tokens: the last sample reads
    on."""
    stream = []
    while tokens > 0:
        order = _shuffled_documents(documents, seed, epoch)
        last = _index.build_sample_index(lengths, order, min(tokens, total) - 1, 1, 1)[0, 0]
        stream.append(order[: last + 1].copy() if tokens < total else order)
        tokens -= total
        epoch += 1
    return stream


def megatron_order(
    lengths: NDArray[np.int32], documents: range, num_samples: int | None, seq_length: int, seed: int
) -> Arrays:
    """Megatron-core 0.16's GPTDataset: epochs mixed, all samples of all epochs it needs (num_samples or
    more).

    One RandomState (MT19937) shuffles the documents, then the samples. The last epoch is kept apart where
    fewer than 80% of its samples are needed.
    """
    total = _total(lengths, documents)
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // total))
    count = (epochs * total - 1) // seq_length
    apart = False
    before = 0
    if epochs > 1 and num_samples is not None:
        before = ((epochs - 1) * total - 1) // seq_length
        apart = num_samples - before < int(0.80 * ((total - 1) // seq_length))
    random = np.random.RandomState(seed)
    order = _repeated(documents, epochs)
    mixed = (epochs - 1) * len(documents) if apart else len(order)
    random.shuffle(order[:mixed])
    if apart:
        random.shuffle(order[mixed:])
    rows = _index.build_sample_index(lengths, order, 0, seq_length, count)
    samples = _arange(count, 2**32 - 2, np.uint32)
    random.shuffle(samples[: before if apart else count])
    if apart:
        random.shuffle(samples[before:])
    return {"documents": order, "starts": rows[samples]}


def _total(lengths: NDArray[np.int32], documents: range) -> int:
    return int(lengths[documents.start : documents.stop].sum(dtype=np.int64))


def _arange(count: int, largest: int, small: type = np.int32) -> NDArray[Any]:
    return np.arange(count, dtype=small if count < largest else np.int64)


def _shuffled_documents(documents: range, seed: int, epoch: int) -> NDArray[Any]:
    dtype = np.int32 if documents.stop <= _INT32_MAX else np.int64
    order = np.arange(documents.start, documents.stop, dtype=dtype)
    _index.shuffle(order, seed, epoch, _DOCUMENTS)
    return order


def _repeated(documents: range, epochs: int) -> NDArray[Any]:
    return np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)


def split_edges(split: str, count: int) -> list[range | None]:
    """Divide `count` sequences as "969,30,1" says, with Megatron's rounding; None where the share is zero.

    Raises DatasetError for a text that is not a split.
    """
    try:
        shares = split_sizes(split)
    except ValueError as error:
        raise DatasetError(f"data.split: {error}") from None
    whole = shares[0] + shares[1] + shares[2]  # sum() rounds differently from Python 3.12 on
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share / whole)
    ranges = (range(round(low * count), round(high * count)) for low, high in itertools.pairwise(edges))
    return [part if share else None for part, share in zip(ranges, shares, strict=True)]
