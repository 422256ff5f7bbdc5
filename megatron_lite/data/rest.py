"""What is left of a stream after its first samples: what a run goes on with when it cuts the stream anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.sample_index import (
    WHOLE,
    Packing,
    Part,
    Start,
    Tokens,
    packed_parts,
    part_documents,
    shuffle_samples,
    stream_parts,
)


class Taken(NamedTuple):
    """The first `samples` samples of a stream that was cut into samples of `seq_length` tokens."""

    seq_length: int
    packing: Packing
    samples: int


def merged(history: Iterable[Taken]) -> list[Taken]:
    """`history` without what changes nothing: empty entries, and neighbours that were cut alike."""
    result: list[Taken] = []
    for taken in history:
        if result and result[-1][:2] == taken[:2]:
            result[-1] = taken._replace(samples=result[-1].samples + taken.samples)
        elif taken.samples:
            result.append(taken)
    return result


def start_after(tokens: Tokens, history: Iterable[Taken]) -> Start:
    """What is left when all of `history` has been taken, one entry after the other.

    Each entry but the first cuts anew what the one before it left.
    """
    start = WHOLE
    for taken in merged(history):
        after = _after_packed if taken.packing == "best_fit" else _after_joined
        rest, epoch, skip = after(tokens, start, taken)
        total = tokens.total
        start = Start(rest, epoch + skip // total, skip % total, start.cuts + 1)
    return start


_Left = tuple[NDArray[np.int64], int, int]  # rest, epoch and skip of a Start


def _after_joined(tokens: Tokens, start: Start, taken: Taken) -> _Left:
    done, parts = 0, stream_parts(tokens.total, taken.seq_length, start)
    part = next(parts)
    while taken.samples >= done + part.samples:
        done += part.samples
        part = next(parts)
    if part.epoch is not None and taken.samples == done:
        return WHOLE.rest, part.epoch, part.skip + part.offset
    left = np.arange(part.samples, dtype=np.int64)
    shuffle_samples(left, tokens.seed, start, part)
    left = np.sort(left[taken.samples - done :])
    begins = part.offset + left * taken.seq_length
    # Tokens after the part that its last sample holds, taken or not, belong to no other sample.
    overlap = part.offset + part.samples * taken.seq_length - part.tokens
    epoch = start.epoch if part.epoch is None else part.epoch + 1
    documents, spans = _joined(tokens, start, part, epoch, overlap)
    rest = _cut(documents, spans, begins, begins + taken.seq_length)
    return rest, epoch, overlap + (start.skip if epoch == start.epoch else 0)


def _joined(
    tokens: Tokens, start: Start, part: Part, epoch: int, overlap: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(documents [n], spans [n, 2]) of a part, and of what follows it as far as `overlap` tokens go."""
    documents, spans = _explicit(tokens, *part_documents(tokens, start, part))
    while overlap > 0:
        skip = start.skip if epoch == start.epoch else 0
        following = Part(epoch, skip, tokens.total - skip, 0, 0)
        more, more_spans = _explicit(tokens, *part_documents(tokens, start, following))
        documents, spans = np.concatenate([documents, more]), np.concatenate([spans, more_spans])
        overlap -= following.tokens
        epoch += 1
    return documents, spans


def _explicit(
    tokens: Tokens, documents: NDArray[Any], spans: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    whole = np.zeros((len(documents), 2), np.int64)
    whole[:, 1] = tokens.lengths[documents]
    whole[: len(spans)] = spans
    return documents, whole


def _cut(
    documents: NDArray[Any], spans: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rows (document, first token, end) of the tokens begins[i] up to ends[i] of a stream; i ascends."""
    after = np.cumsum(spans[:, 1] - spans[:, 0])  # where in the stream each element ends
    joined = np.append(begins[1:] == ends[:-1], False)
    begins, ends = begins[np.append(True, ~joined[:-1])[: len(begins)]], ends[~joined]
    first = np.searchsorted(after, begins, side="right")
    last = np.searchsorted(after, ends - 1, side="right")
    counts = last - first + 1
    interval = np.repeat(np.arange(len(begins)), counts)
    element = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[interval]
    origin = after[element] - spans[element, 1]  # of the document's own token numbers in the stream
    rest = np.stack(
        [
            documents[element].astype(np.int64),
            np.maximum(begins[interval] - origin, spans[element, 0]),
            np.minimum(ends[interval] - origin, spans[element, 1]),
        ],
        axis=1,
    )
    return rest[rest[:, 1] < rest[:, 2]]


def _after_packed(tokens: Tokens, start: Start, taken: Taken) -> _Left:
    done, parts = 0, packed_parts(tokens, taken.seq_length, start)
    part, arrays = next(parts)
    while taken.samples >= done + part.samples:
        done += part.samples
        part, arrays = next(parts)
    if part.epoch is not None and taken.samples == done:
        return WHOLE.rest, part.epoch, part.skip
    left = np.arange(part.samples, dtype=np.int64)
    shuffle_samples(left, tokens.seed, start, part)
    rows = arrays["starts"][np.sort(left[taken.samples - done :])].astype(np.int64)
    element = np.repeat(rows[:, 0] - (np.cumsum(rows[:, 1]) - rows[:, 1]), rows[:, 1]) + np.arange(
        rows[:, 1].sum()
    )
    rest = np.column_stack([arrays["documents"][element], arrays["spans"][element]]).astype(np.int64)
    rest = _healed(rest[np.lexsort((rest[:, 1], rest[:, 0]))])
    if part.epoch is None:
        return rest, start.epoch, start.skip
    return rest, part.epoch + 1, 0


def _healed(rest: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pieces of one document that follow each other, joined; `rest` is sorted by document and first token."""
    follows = (rest[1:, 0] == rest[:-1, 0]) & (rest[1:, 1] == rest[:-1, 2])
    begin, end = np.append(True, ~follows), np.append(~follows, True)
    return np.column_stack([rest[begin, 0], rest[begin, 1], rest[end, 2]])
