"""One chunk of input to arrays of ids: what each worker of `encode_corpus` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus.reader import Chunk, CorpusError, Problem, parse_chunk
from megatron_lite.corpus.sentences import sentence_splitter
from megatron_lite.data import token_dtype
from megatron_lite.tokenizers import (
    Encoder,
    GigatokenTokenizer,
    SpecialTokens,
    check_equal,
    encode_flat,
    load_fast_tokenizer,
)

_VERIFIED = 1 << 13  # characters of a long document that are verified


@dataclass(frozen=True)
class EncodeSettings:
    """What decides which ids a document becomes.

    tokenizer: specification for `load_tokenizer`
    keys: of the JSON object, each a dataset of its own
    append_eod: end each document that has ids with the tokenizer's eod
    special_tokens, encoder: see `load_fast_tokenizer`
    verify: every so many documents of a file one is compared with the tokenizer's own library; 0: none
    language: divide documents into sentences of this language, a sequence each; None: a document is a sequence
    keep_newlines: line ends between sentences stay
    """

    tokenizer: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    special_tokens: SpecialTokens = "plain"
    encoder: Encoder = "auto"
    verify: int = 1000
    language: str | None = None
    keep_newlines: bool = False

    @property
    def level(self) -> str:
        """What a sequence is, as names of files say it."""
        return "document" if self.language is None else "sentence"


class Ids(NamedTuple):
    """The documents of one key: ids back to back, [S] tokens of each sequence, [D] sequences of each document."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    def first(self, documents: int) -> Ids:
        """The first so many documents."""
        counts = self.counts[:documents]
        lengths = self.lengths[: int(counts.sum())]
        return Ids(self.tokens[: int(lengths.sum())], lengths, counts)


class Encoded(NamedTuple):
    """One chunk, encoded: a value for each key, and what could not be."""

    keys: list[Ids]
    problems: list[Problem]

    @property
    def documents(self) -> int:
        return len(self.keys[0].counts)


class ChunkEncoder:
    """Called with a chunk, gives what it encodes to. Threads may share one where its tokenizer is gigatoken's.

    Raises TokenizerError and CorpusError for settings that cannot be met.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings
        self.tokenizer = load_fast_tokenizer(settings.tokenizer, settings.special_tokens, settings.encoder)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.eod_id = self.tokenizer.eod_id if settings.append_eod else None
        if settings.append_eod and self.eod_id is None:
            raise CorpusError(
                f"{settings.tokenizer}: has no end-of-document token to append; leave --append-eod out"
            )
        self._split: Callable[[str], list[str]] | None = None
        if settings.language is not None:
            self._split = sentence_splitter(settings.language, settings.keep_newlines)

    def __call__(self, chunk: Chunk) -> Encoded:
        documents, problems = parse_chunk(chunk, self.settings.keys)
        by_key = zip(*documents, strict=True) if documents else ((),) * len(self.settings.keys)
        return Encoded([self._encode(texts, chunk.first) for texts in by_key], problems)

    def _encode(self, texts: Sequence[str], first: int) -> Ids:
        if self._split is not None:
            return self._encode_sentences([self._split(text) for text in texts])
        tokens, lengths = encode_flat(self.tokenizer, texts, self.eod_id)
        if isinstance(self.tokenizer, GigatokenTokenizer) and self.settings.verify:
            self._verify(self.tokenizer, texts, tokens, lengths, -first % self.settings.verify)
        full = lengths > 0
        return Ids(self._cast(tokens), lengths[full], full.astype(np.int64))

    def _encode_sentences(self, documents: list[list[str]]) -> Ids:
        """A text without ids gets no eod; a sentence without ids is no sequence: as Megatron writes them."""
        tokens, lengths = encode_flat(self.tokenizer, [text for texts in documents for text in texts])
        bounds = np.cumsum([0, *map(len, documents)])
        counts = np.diff(np.concatenate(([0], np.cumsum(lengths > 0)))[bounds])
        lengths = lengths[lengths > 0]
        if self.eod_id is not None and len(lengths):
            last = np.cumsum(counts)[counts > 0] - 1  # sentence of each document
            tokens = np.insert(tokens, np.cumsum(lengths)[last], self.eod_id)
            lengths[last] += 1
        return Ids(self._cast(tokens), lengths, counts)

    def _cast(self, tokens: NDArray[Any]) -> NDArray[Any]:
        if tokens.max(initial=0) >= self.tokenizer.vocab_size:
            raise CorpusError(
                f"{self.tokenizer.name}: gave id {tokens.max()} of a vocabulary of {self.tokenizer.vocab_size}"
            )
        return tokens.astype(self.dtype)

    def _verify(
        self,
        tokenizer: GigatokenTokenizer,
        texts: Sequence[str],
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        start: int,
    ) -> None:
        ends = np.cumsum(lengths)
        for number in range(start, len(texts), self.settings.verify):
            text, end = texts[number], int(ends[number])
            if len(text) > _VERIFIED:
                check_equal(tokenizer, [text[:_VERIFIED]])
                continue
            expected = tokenizer.reference.encode(text)
            eod = [self.eod_id] if expected and self.eod_id is not None else []
            if tokens[end - int(lengths[number]) : end].tolist() != expected + eod:
                raise CorpusError(
                    f"gigatoken gives other ids than {tokenizer.name} for the text that begins {text[:80]!r}: please "
                    "report it, and take --encoder reference"
                )
