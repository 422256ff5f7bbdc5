"""What each source of a run has given: kept in checkpoints, so that the mixture may change and nothing is lost.

A source is one prefix of data.train (the part of it that data.split gives to training). Which samples it has
given is known from how many of them, cut how, one after the other: `history`, a list of `rest.Taken`. All else
is a function of the seed. While nothing changes the run reads one dataset from its beginning; where the weights,
the sources, the sequence length or the packing are others on resume, a new dataset begins at that sample of the
run: each source goes on after what it has given, a new one begins at its first sample.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_lite.data.cache import content_stamp
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.rest import Taken, merged

logger = logging.getLogger(__name__)

_SAMPLED = 1 << 16  # ids hashed at either end of a source


class Source(NamedTuple):
    """One source and what it gave before the present mixture.

    key: of its content and place in the file, so that moved files are known again
    weight: share of the mixture; 0: not in it (any more)
    seed: of its order, kept while the source is: train.seed may change
    """

    key: str
    prefix: str
    documents: tuple[int, int]
    weight: float
    seed: int
    history: tuple[Taken, ...] = ()


class Position(NamedTuple):
    """Where the present mixture begins.

    first: its first sample, in samples of the run
    samples: of the whole run, as far as it was known (which only order "megatron" depends on)
    sources: those in the mixture, in order, and then those that were in it before
    """

    order: str
    seq_length: int
    packing: str
    first: int
    samples: int
    sources: tuple[Source, ...]

    def state(self, given: Sequence[int]) -> dict[str, Any]:
        """As JSON, with how many samples each source of the mixture has given in it."""
        counts = [*given, *[0] * (len(self.sources) - len(given))]
        sources = [
            source._asdict() | {"given": count} for source, count in zip(self.sources, counts, strict=True)
        ]
        return self._asdict() | {"sources": sources}


def source_key(indexed: IndexedDataset, documents: range) -> str:
    """A hash of the lengths of these sequences, and of ids from their beginning and end."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(content_stamp(indexed.lengths[documents.start : documents.stop]).encode())
    if documents:
        begin = int(indexed.offsets[documents[0]]) // indexed.dtype.itemsize
        end = int(indexed.offsets[documents[-1]]) // indexed.dtype.itemsize + int(
            indexed.lengths[documents[-1]]
        )
        digest.update(indexed.tokens[begin : min(end, begin + _SAMPLED)].tobytes())
        digest.update(indexed.tokens[max(begin, end - _SAMPLED) : end].tobytes())
    return digest.hexdigest()


def read_position(state: dict[str, Any]) -> tuple[Position, list[int]]:
    """(position, what each source has given since) of what `Position.state` made."""
    sources, given = [], []
    for entry in state["sources"]:
        given.append(entry["given"])
        fields = {name: entry[name] for name in Source._fields}
        fields["documents"] = tuple(entry["documents"])
        fields["history"] = tuple(Taken(*taken) for taken in entry["history"])
        sources.append(Source(**fields))
    fields = {name: state[name] for name in Position._fields}
    return Position(**fields | {"sources": tuple(sources)}), given


def taken_of(position: Position, number: int, given: int) -> tuple[Taken, ...]:
    """The whole history of a source, with what it gave in the present mixture."""
    now = Taken(position.seq_length, position.packing, given)  # type: ignore[arg-type]
    return tuple(merged([*position.sources[number].history, now]))


def continued(new: Position, saved: dict[str, Any], consumed: int) -> Position:
    """`new`, a mixture without a history, as what a run goes on with at sample `consumed`; `saved` itself where
    the mixture is the same.

    Raises DatasetError where order "megatron" would have to go on with another mixture.
    """
    old, given = read_position(saved)
    matched, left = _matched(new.sources, old.sources)
    active = [source for source in old.sources if source.weight]
    kept = {old.sources[number].seed for number in matched if number is not None}
    if kept - {source.seed for source in new.sources}:
        logger.info("train.seed is another one: data that have begun keep the order they have")
    if _is_same(new, old, active, matched):
        prefixes = [source.prefix for source in new.sources] + [s.prefix for s in old.sources[len(active) :]]
        renamed = (s._replace(prefix=prefix) for s, prefix in zip(old.sources, prefixes, strict=True))
        if old.order == "megatron" and old.samples != new.samples:
            logger.warning(
                'data.order "megatron": the order was made for %d samples, and the run now takes %d; where that '
                "takes another number of epochs documents may be repeated or left out",
                *(old.samples, new.samples),
            )
        return old._replace(samples=new.samples, sources=tuple(renamed))
    if "megatron" in (old.order, new.order):
        raise DatasetError(
            f"{_difference(old, new)}: with data.order megatron the samples' order is a function of the whole run, so "
            "nothing can be changed within one without repeating and losing documents. Set it back, begin another run "
            'from the weights alone (checkpoint.weights_only), or take data.order "epoch" from the start'
        )
    sources = []
    for source, number in zip(new.sources, matched, strict=True):
        if number is not None:
            history = taken_of(old, number, given[number])
            source = source._replace(seed=old.sources[number].seed, history=history)
        sources.append(source)
    replaced = {old.sources[number].prefix for number in left}
    for source in sources:
        if source.prefix in replaced and not source.history:
            logger.warning(
                "%s holds other data than when the checkpoint was written (its files, or data.split): it begins "
                "anew, and documents that it held then may be repeated",
                source.prefix,
            )
    for number in left:
        history = taken_of(old, number, given[number])
        sources.append(old.sources[number]._replace(weight=0.0, history=history))
    return new._replace(first=consumed, sources=tuple(sources))


def _matched(new: Sequence[Source], old: Sequence[Source]) -> tuple[list[int | None], list[int]]:
    """(for each new source its number among the old ones, numbers of the old ones that are left).

    Those of the same prefix first: another one of the same content may be a copy, or where the files are now.
    """
    matched: list[int | None] = [None] * len(new)
    left = list(range(len(old)))
    for is_same in (lambda a, b: (a.key, a.prefix) == (b.key, b.prefix), lambda a, b: a.key == b.key):
        for number, source in enumerate(new):
            if matched[number] is None:
                matched[number] = next((other for other in left if is_same(source, old[other])), None)
                left = [other for other in left if other != matched[number]]
    return matched, left


def _is_same(new: Position, old: Position, active: Sequence[Source], matched: Sequence[int | None]) -> bool:
    settings = [(p.order, p.seq_length, p.packing) for p in (new, old)]
    weights = [[source.weight for source in sources] for sources in (new.sources, active)]
    return (
        settings[0] == settings[1] and list(matched) == list(range(len(active))) and weights[0] == weights[1]
    )


def _difference(old: Position, new: Position) -> str:
    changed = [
        f"{key} was {before} and is {now}"
        for key, before, now in (
            ("data.order", old.order, new.order),
            ("model.seq_length", old.seq_length, new.seq_length),
            ("data.packing", old.packing, new.packing),
        )
        if before != now
    ]
    return "; ".join(changed) or "the mixture of data.train is another one than the checkpoint's"
