"""Tokenizers that need no library: bytes, characters, words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_lite.tokenizers.base import EOD_TEXT, TokenizerError, checked, hash_of

UNKNOWN_TEXT = "\ufffd"
_EOD_BYTE = 256
_WORDS = re.compile(r"\w+|\s|[^\w\s]")


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    name = "byte"
    vocab_size = 257
    eod_id = _EOD_BYTE

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        values = checked(ids, self.vocab_size, self.name)
        eod = EOD_TEXT.encode()
        return b"".join(eod if v == _EOD_BYTE else bytes((v,)) for v in values).decode("utf-8", "replace")

    def fingerprint(self) -> str:
        return hash_of("byte")


class _ListTokenizer:
    """Ids are places in a list of pieces of text; after them come one id for unknown pieces and one for eod.

    kept as JSON: {"type": "char" | "word", "tokens": [...]}
    """

    kind: str

    def __init__(self, tokens: Sequence[str], name: str | None = None) -> None:
        self.name = name or self.kind
        self.tokens = list(tokens)
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens) or not all(self.tokens):
            raise TokenizerError(f"{self.name}: a token is empty or listed twice")
        self.unknown_id = len(self.tokens)
        self.eod_id = self.unknown_id + 1
        self.vocab_size = self.eod_id + 1

    @staticmethod
    def divide(text: str) -> Iterable[str]:
        """The pieces of a text, in order; joined they are the text."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> _ListTokenizer:
        """Read the JSON that `save` wrote. Raises TokenizerError where it is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, tokens = content["type"], content["tokens"]
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            kind, tokens = None, None
        if kind != cls.kind or not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise TokenizerError(f'{path}: not a JSON file of {{"type": "{cls.kind}", "tokens": [...]}}')
        return cls(tokens, name or f"{cls.kind}:{path}")

    def save(self, path: str | Path) -> None:
        text = json.dumps({"type": self.kind, "tokens": self.tokens}, ensure_ascii=False, indent=0)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        ids, unknown = self._ids, self.unknown_id
        return [ids.get(piece, unknown) for piece in self.divide(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [*self.tokens, UNKNOWN_TEXT, EOD_TEXT]
        return "".join(pieces[value] for value in checked(ids, self.vocab_size, self.name))

    def fingerprint(self) -> str:
        return hash_of(self.kind, *self.tokens)


class CharTokenizer(_ListTokenizer):
    """One id a character (Unicode code point)."""

    kind = "char"

    @staticmethod
    def divide(text: str) -> Iterable[str]:
        return text

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        """All characters of the texts, in code point order."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(sorted(characters))


class WordTokenizer(_ListTokenizer):
    """One id a word (letters, digits and _), a single space or line break, or another single character."""

    kind = "word"

    @staticmethod
    def divide(text: str) -> Iterable[str]:
        return _WORDS.findall(text)

    @classmethod
    def train(cls, texts: Iterable[str], max_tokens: int | None = None) -> WordTokenizer:
        """The most frequent pieces of the texts, most frequent first, ties in code point order.

        max_tokens: entries kept, unknown and eod not counted; None: all
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(cls.divide(text))
        ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return cls(ranked[:max_tokens])
