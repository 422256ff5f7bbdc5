"""How well tokenizers do on a text that they have not seen, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from megatron_lite.tokenizers.base import Tokenizer

_CONTEXT = 20  # characters shown on each side of a difference


class Sample(NamedTuple):
    """A text and where it comes from (file:line)."""

    where: str
    text: str


class Measure(NamedTuple):
    """One tokenizer over some documents; bytes are UTF-8, words what stands between white space.

    unknown: tokens that stand for unknown text; None where the vocabulary has no such token
    exact: documents that come back as they were
    failure: the first that does not, with where it differs
    seconds: of encoding, as the library does it (with its own threads)
    """

    name: str
    vocab_size: int
    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    unknown: int | None
    exact: int
    failure: str | None
    seconds: float


def measure(tokenizer: Tokenizer, samples: Sequence[Sample]) -> Measure:
    texts = [sample.text for sample in samples]
    tokenizer.encode_batch(texts[:1])  # libraries start their threads and caches at the first text
    started = time.perf_counter()
    encoded = tokenizer.encode_batch(texts)
    seconds = time.perf_counter() - started
    unknown_id = getattr(tokenizer, "unknown_id", None)
    exact, failure = 0, None
    for sample, ids in zip(samples, encoded, strict=True):
        back = tokenizer.decode(ids)
        if back == sample.text:
            exact += 1
        elif failure is None:
            failure = f"{sample.where}: {first_difference(sample.text, back)}"
    return Measure(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        documents=len(texts),
        bytes=sum(len(text.encode("utf-8")) for text in texts),
        characters=sum(map(len, texts)),
        words=sum(len(text.split()) for text in texts),
        tokens=sum(map(len, encoded)),
        unknown=None if unknown_id is None else sum(ids.count(unknown_id) for ids in encoded),
        exact=exact,
        failure=failure,
        seconds=seconds,
    )


def first_difference(text: str, back: str) -> str:
    """Where `back` is another text than `text`, with what stands there."""
    shorter = min(len(text), len(back))
    place = next((place for place in range(shorter) if text[place] != back[place]), shorter)
    here = slice(max(0, place - _CONTEXT), place + _CONTEXT)
    return f"character {place + 1:,}: {text[here]!r} came back as {back[here]!r}"


_HEADER = (
    "tokenizer",
    "vocabulary",
    "bytes/token",
    "chars/token",
    "tokens/word",
    "round trip",
    "unknown",
    "MB/s",
)


def table(measures: Sequence[Measure]) -> str:
    """One line a tokenizer, the header above."""
    rows = [_HEADER, *map(_row, measures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def _row(result: Measure) -> tuple[str, ...]:
    tokens = max(result.tokens, 1)
    return (
        result.name,
        f"{result.vocab_size:,}",
        f"{result.bytes / tokens:.3f}",
        f"{result.characters / tokens:.3f}",
        f"{result.tokens / max(result.words, 1):.3f}",
        f"{result.exact / max(result.documents, 1):.2%}",
        "-" if result.unknown is None else f"{result.unknown / tokens:.3%}",
        f"{result.bytes / 1e6 / max(result.seconds, 1e-9):.1f}",
    )
