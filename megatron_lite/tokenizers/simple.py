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
    """Ids are places in a list of pieces of text; after them come unknown pieces, eod, and the special tokens.

    kept as JSON: {"type": "char" | "word", "tokens": [...]}, and "special": [...] where there are any
    """

    kind: str

    def __init__(
        self, tokens: Sequence[str], name: str | None = None, special_tokens: Sequence[str] = ()
    ) -> None:
        self.name = name or self.kind
        self.tokens = list(tokens)
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens) or not all(self.tokens):
            raise TokenizerError(f"{self.name}: a token is empty or listed twice")
        self.unknown_id = len(self.tokens)
        self.eod_id = self.unknown_id + 1
        self.special_ids = {token: self.eod_id + 1 + place for place, token in enumerate(special_tokens)}
        if len(self.special_ids) != len(special_tokens):
            raise TokenizerError(f"{self.name}: a special token is listed twice")
        self.vocab_size = self.eod_id + 1 + len(special_tokens)

    @staticmethod
    def divide(text: str) -> Iterable[str]:
        """The pieces of a text, in order; joined they are the text."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> _ListTokenizer:
        """Read the JSON that `save` wrote. Raises TokenizerError where it is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, tokens, special = content["type"], content["tokens"], content.get("special", [])
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            kind, tokens, special = None, None, None
        if kind != cls.kind or not _are_texts(tokens) or not _are_texts(special):
            raise TokenizerError(f'{path}: not a JSON file of {{"type": "{cls.kind}", "tokens": [...]}}')
        return cls(tokens, name or f"{cls.kind}:{path}", special)

    def save(self, path: str | Path) -> None:
        content: dict[str, object] = {"type": self.kind, "tokens": self.tokens}
        if self.special_ids:
            content["special"] = list(self.special_ids)
        text = json.dumps(content, ensure_ascii=False, indent=0)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        ids, unknown = self._ids, self.unknown_id
        return [ids.get(piece, unknown) for piece in self.divide(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [*self.tokens, UNKNOWN_TEXT, EOD_TEXT, *self.special_ids]
        return "".join(pieces[value] for value in checked(ids, self.vocab_size, self.name))

    def fingerprint(self) -> str:
        # Special tokens behind an empty piece, which no list of tokens holds.
        return hash_of(self.kind, *self.tokens, *(["", *self.special_ids] if self.special_ids else []))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


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
