"""What every tokenizer offers, and what they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

EOD_TEXT = "<|endoftext|>"
"""How an end-of-document id reads where a tokenizer has no text of its own for it."""

SpecialTokens = Literal["plain", "parse"]
"""What a special token's name in a text is: letters like any others, or the token."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or used as asked; the message says what to change."""


class Tokenizer(Protocol):
    """Text to ids and back.

    Text is only ever text: one that contains "<|endoftext|>" or another special token's name is encoded by
    its letters, unless the tokenizer was loaded to parse them. Nothing is added at either end. `decode` shows
    special ids by their names, and bytes that are not UTF-8 as U+FFFD; it raises TokenizerError for an id outside
    the vocabulary.

    name: the specification it was loaded by ("byte", "hf:tokenizer.json")
    vocab_size: largest id + 1
    eod_id: the end-of-document token, or None where the vocabulary has none
    """

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def fingerprint(self) -> str:
        """A hash of the vocabulary and rules: the same for the same tokenizer wherever its files lie."""
        ...


def hash_of(*parts: str | bytes) -> str:
    """Hexadecimal digest of the parts, each with its length, so that their borders count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def checked(ids: Sequence[int], vocab_size: int, name: str) -> list[int]:
    """`ids` as plain ints, all of them inside the vocabulary."""
    values = [int(value) for value in ids]
    for value in values:
        if not 0 <= value < vocab_size:
            raise TokenizerError(f"{name}: id {value} is outside the vocabulary of {vocab_size:,}")
    return values


def missing(package: str, what: str) -> TokenizerError:
    """The error for a library that is not installed."""
    return TokenizerError(f"{what} need the package {package}: pip install {package}")


def read_bytes(path: str | Path) -> bytes:
    """A file's content. Raises TokenizerError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
