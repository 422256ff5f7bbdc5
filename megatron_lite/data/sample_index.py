"""Which tokens each training sample holds, in training order.

Sequences ("documents" below, as Megatron's GPTDataset calls them) are put in some order and joined to one
stream; a sample is S tokens of it. An order is three arrays:

documents [D] int32/int64: sequence numbers in stream order
spans [m, 2] int32: which tokens (first, end) of its document each of the first m elements of the stream stands
    for; the others are whole
starts [K, 2] int32/int64: for sample i of the training order, (position in `documents`, token offset) of its
    first token; with packing (position, number of elements), since then a sample is whole elements
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data import _index
from megatron_lite.data.cache import Arrays
from megatron_lite.data.errors import DatasetError

Packing = Literal["concat", "best_fit"]

_INT32_MAX = 2**31 - 1
# What a shuffle is for. What is left of an epoch is shuffled anew each time that it is cut anew.
_DOCUMENTS, _SAMPLES, _REST = 0, 1, 2
NO_SPANS = np.zeros((0, 2), np.int32)


class Start(NamedTuple):
    """Where a stream begins: with what earlier samples left of an epoch, then epoch `epoch` from its token `skip`
    on, then whole epochs.

    rest: [n, 3] int64, (document, first token, end)
    cuts: how often the stream was cut anew before this
    """

    rest: NDArray[np.int64] = np.zeros((0, 3), np.int64)
    epoch: int = 0
    skip: int = 0
    cuts: int = 0


WHOLE = Start()


class Tokens(NamedTuple):
    """The sequences of one split: `lengths` [N] of all sequences of the file, `documents` those of the split."""

    lengths: NDArray[np.int32]
    documents: range
    seed: int

    @property
    def total(self) -> int:
        return int(self.lengths[self.documents.start : self.documents.stop].sum(dtype=np.int64))


class Part(NamedTuple):
    """A stretch of the stream whose samples are shuffled among themselves; None: the rest before `epoch`."""

    epoch: int | None
    skip: int  # tokens of the epoch that earlier samples hold
    tokens: int
    offset: int  # where its first sample begins; tokens before it are in the last sample of the part before
    samples: int


def epoch_order(tokens: Tokens, num_samples: int | None, seq_length: int, start: Start = WHOLE) -> Arrays:
    """Every document once per epoch, each epoch in an order of its own; samples are shuffled within their
    epoch.

    A sample belongs to the epoch of its first token. All is a function of (seed, epoch) alone, so asking for
    more samples only adds to the end. Memory beyond the result is the samples of one epoch.

    num_samples: samples wanted, over as many epochs as they take; None: those that fit into one epoch
    """
    total = tokens.total
    if num_samples is None:
        wanted = (total - 1) // seq_length
        tail: list[NDArray[Any]] = []
        parts = [Part(0, 0, total, 0, wanted)] if wanted else []
    else:
        wanted = num_samples
        parts, tail = _parts_for(tokens, wanted, seq_length, start)
    special = [part_documents(tokens, start, part) if _is_special(part) else None for part in parts]
    sizes = [len(tokens.documents) if found is None else len(found[0]) for found in special]
    stream = np.empty(sum(sizes) + sum(map(len, tail)), _document_type(tokens.documents))
    starts = np.empty((wanted, 2), np.int32 if len(stream) <= _INT32_MAX else np.int64)
    spans = np.concatenate([NO_SPANS, *(found[1] for found in special if found is not None)])
    done = position = 0
    for part, found, size in zip(parts, special, sizes, strict=True):
        _fill_documents(stream[position : position + size], tokens, part, found)
        rows = starts[done : done + part.samples]
        if len(rows) < part.samples:  # which of them are wanted shows only when all are shuffled
            rows = np.empty((part.samples, 2), starts.dtype)
        _index.fill_starts(rows, tokens.lengths, stream, spans, position, part.offset, seq_length)
        shuffle_samples(rows, tokens.seed, start, part)
        if done + len(rows) > wanted:
            starts[done:] = rows[: wanted - done]
        done, position = done + len(rows), position + size
    for head in tail:
        stream[position : position + len(head)] = head
        position += len(head)
    return {"documents": stream, "spans": spans, "starts": starts}


def _fill_documents(
    out: NDArray[Any], tokens: Tokens, part: Part, found: tuple[NDArray[Any], NDArray[np.int32]] | None
) -> None:
    if found is not None:
        out[:] = found[0]
        return
    assert part.epoch is not None
    out[:] = np.arange(tokens.documents.start, tokens.documents.stop, dtype=out.dtype)
    _index.shuffle(out, tokens.seed, part.epoch, _DOCUMENTS)


def _parts_for(
    tokens: Tokens, wanted: int, seq_length: int, start: Start
) -> tuple[list[Part], list[NDArray[Any]]]:
    """The parts that hold this many samples, and the documents after them that the last sample reads on into."""
    parts: list[Part] = []
    done = 0
    for part in stream_parts(tokens.total, seq_length, start):
        # Elements with a span come first in a stream, so these parts are taken whole.
        if done >= wanted and not _is_special(part):
            return parts, _heads(tokens, part) if wanted else []
        parts.append(part if done < wanted else part._replace(samples=0))
        done += part.samples
    raise AssertionError("the stream has no end")


def stream_parts(total: int, seq_length: int, start: Start) -> Iterator[Part]:
    """The rest, then epoch after epoch for ever."""
    offset = 0
    if len(start.rest):
        left = int((start.rest[:, 2] - start.rest[:, 1]).sum())
        samples = -(-left // seq_length)
        yield Part(None, 0, left, 0, samples)
        offset = samples * seq_length - left
    for epoch in itertools.count(start.epoch):
        skip = start.skip if epoch == start.epoch else 0
        left = total - skip
        samples = max(0, -(-(left - offset) // seq_length))
        yield Part(epoch, skip, left, offset, samples)
        offset += samples * seq_length - left


def _is_special(part: Part) -> bool:
    return part.epoch is None or part.skip > 0


def part_documents(tokens: Tokens, start: Start, part: Part) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """(documents, spans) of a part; as everywhere, elements after the last span are whole."""
    if part.epoch is None:
        return start.rest[:, 0].astype(_document_type(tokens.documents)), start.rest[:, 1:].astype(np.int32)
    order = shuffled_documents(tokens, part.epoch)
    if not part.skip:
        return order, NO_SPANS
    position, offset = locate(tokens.lengths, order, part.skip)
    order = order[position:].copy()
    return order, np.array([[offset, tokens.lengths[order[0]]]], np.int32)


def _heads(tokens: Tokens, part: Part) -> list[NDArray[Any]]:
    """The first documents from `part` on, up to the label of the last sample that begins before it."""
    heads: list[NDArray[Any]] = []
    missing = part.offset + 1
    for epoch in itertools.count(part.epoch or 0):
        order = shuffled_documents(tokens, epoch)
        if missing <= part.tokens:
            last, _ = locate(tokens.lengths, order, missing - 1)
            return [*heads, order[: last + 1].copy()]
        heads.append(order)
        missing -= part.tokens
    raise AssertionError("there is always another epoch")


def locate(lengths: NDArray[np.int32], documents: NDArray[Any], token: int) -> tuple[int, int]:
    """Where in these documents, joined, a token is: (position, offset)."""
    row = np.empty((1, 2), np.int64)
    _index.fill_starts(row, lengths, documents, NO_SPANS, 0, token, 1)
    return int(row[0, 0]), int(row[0, 1])


def shuffled_documents(tokens: Tokens, epoch: int) -> NDArray[Any]:
    """The documents of an epoch in its order."""
    order = np.arange(tokens.documents.start, tokens.documents.stop, dtype=_document_type(tokens.documents))
    _index.shuffle(order, tokens.seed, epoch, _DOCUMENTS)
    return order


def shuffle_samples(samples: NDArray[Any], seed: int, start: Start, part: Part) -> None:
    """Put the samples of a part, a row for each, into training order."""
    if part.epoch is None:
        _index.shuffle(samples, seed, start.epoch, _REST + start.cuts)
    else:
        _index.shuffle(samples, seed, part.epoch, _SAMPLES)


def _document_type(documents: range) -> type[np.signedinteger[Any]]:
    return np.int32 if documents.stop <= _INT32_MAX else np.int64


def packed_order(tokens: Tokens, num_samples: int | None, seq_length: int, start: Start = WHOLE) -> Arrays:
    """Documents side by side in rows of `seq_length` tokens, an epoch at a time: see `csrc/packing.h`.

    Documents of at most `seq_length` tokens stay whole, of longer ones what is left after whole rows. Rows are
    shuffled within their epoch. The arguments are those of `epoch_order`. Besides its arrays there is a "report"
    on the first epoch: documents, how many packing cuts, how many would be cut end to end, tokens, padding.
    """
    made: list[Arrays] = []
    report = np.zeros(5, np.int64)
    done = position = 0
    for part, arrays in packed_parts(tokens, seq_length, start):
        if num_samples is not None and done >= num_samples:
            break
        if not made:
            report = _packing_report(tokens, seq_length, start, part, arrays)
        rows = arrays["starts"].astype(np.int64)
        shuffle_samples(rows, tokens.seed, start, part)
        rows[:, 0] += position
        made.append(arrays | {"starts": rows if num_samples is None else rows[: num_samples - done]})
        done, position = done + len(rows), position + len(arrays["documents"])
        if num_samples is None:
            break
    empty = {"documents": NO_SPANS[:, 0], "spans": NO_SPANS, "starts": NO_SPANS}
    order = {name: np.concatenate([arrays[name] for arrays in made or [empty]]) for name in empty}
    if position <= _INT32_MAX:
        order["starts"] = order["starts"].astype(np.int32)
    return order | {"report": report}


def _packing_report(
    tokens: Tokens, seq_length: int, start: Start, part: Part, arrays: Arrays
) -> NDArray[np.int64]:
    """Of a part: documents, how many of them packing cuts, how many joining them end to end would cut, tokens, and
    tokens of padding."""
    documents, spans = part_documents(tokens, start, part)
    joined, longer = _index.count_cut(tokens.lengths, documents, spans, seq_length)
    used = int((arrays["spans"][:, 1] - arrays["spans"][:, 0]).sum(dtype=np.int64))
    return np.array([len(documents), longer, joined, used, part.samples * seq_length - used])


def packed_parts(tokens: Tokens, seq_length: int, start: Start) -> Iterator[tuple[Part, Arrays]]:
    """The rest, then epoch after epoch for ever, each packed by itself; rows are not shuffled yet."""
    total = tokens.total
    for part in _unpacked_parts(total, start):
        documents, spans = part_documents(tokens, start, part)
        documents, spans, starts = _index.pack(tokens.lengths, documents, spans, seq_length)
        arrays = {"documents": documents, "spans": spans, "starts": starts}
        yield part._replace(samples=len(starts)), arrays


def _unpacked_parts(total: int, start: Start) -> Iterator[Part]:
    if len(start.rest):
        yield Part(None, 0, 0, 0, 0)
    yield Part(start.epoch, start.skip, total - start.skip, 0, 0)
    for epoch in itertools.count(start.epoch + 1):
        yield Part(epoch, 0, total, 0, 0)


def megatron_order(tokens: Tokens, num_samples: int | None, seq_length: int) -> Arrays:
    """Megatron-core 0.16's GPTDataset: epochs mixed, all samples of all epochs it needs (num_samples or
    more).

    One RandomState (MT19937) shuffles the documents, then the samples. The last epoch is kept apart where
    fewer than 80% of its samples are needed.

    Raises DatasetError for a seed that RandomState does not take.
    """
    if not 0 <= tokens.seed < 2**32:
        raise DatasetError(f'train.seed {tokens.seed}: with data.order "megatron" it is less than 2^32')
    total = tokens.total
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // total))
    count = (epochs * total - 1) // seq_length
    apart = False
    before = 0
    if epochs > 1 and num_samples is not None:
        before = ((epochs - 1) * total - 1) // seq_length
        apart = num_samples - before < int(0.80 * ((total - 1) // seq_length))
    random = _index.LegacyRandom(tokens.seed)
    size = len(tokens.documents)
    order = np.empty(epochs * size, np.int32)
    for epoch in range(epochs):
        order[epoch * size : (epoch + 1) * size] = np.arange(tokens.documents.start, tokens.documents.stop)
    mixed = (epochs - 1) * size if apart else len(order)
    random.shuffle(order[:mixed])
    random.shuffle(order[mixed:])
    starts = np.empty((count, 2), np.int32 if len(order) <= _INT32_MAX else np.int64)
    _index.fill_starts(starts, tokens.lengths, order, NO_SPANS, 0, 0, seq_length)
    if not apart:
        before = count
    random.shuffle(starts[:before])
    random.shuffle(starts[before:])
    return {"documents": order, "spans": NO_SPANS, "starts": starts}


def split_edges(split: str, count: int) -> list[range | None]:
    """Divide `count` sequences as "969,30,1" says, with Megatron's rounding; None where the share is zero.

    Raises DatasetError for a text that is not a split.
    """
    from megatron_lite.config import split_sizes  # here: settings take 0.1 s to load

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
