"""Byte-level BPE by the `gigatoken` library, ten times as fast as the libraries whose ids it gives.

It is taken only where it is exact: for the vocabularies of GPT-2, cl100k and o200k (whatever file they come in), and
after both have encoded `hard_texts` to the same ids.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_lite.tokenizers.base import SpecialTokens, Tokenizer, TokenizerError
from megatron_lite.tokenizers.flat import flat_of
from megatron_lite.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lite.tokenizers.load import load_tokenizer
from megatron_lite.tokenizers.openai import TiktokenTokenizer

if TYPE_CHECKING:
    from gigatoken.gigatoken_rs import BPETokenizer

logger = logging.getLogger(__name__)

Encoder = Literal["auto", "gigatoken", "reference"]

# Between the texts of a batch, as a special token of the library's: two code points that Unicode gives to no character.
_BORDER = "\U0010fffe\x00\U0010ffff"
_BORDER_BYTES = _BORDER.encode()
_SCHEMES = {"gpt2": "gpt2", "r50k": "gpt2", "cl100k": "gpt4", "o200k": "o200k"}
# How a tokenizer.json divides text where it is one of these; GPT-2's is the default of "ByteLevel".
_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# The library keeps every word it has met: after so much text its tables are made anew, which takes 50 ms.
_RENEW_BYTES = 128 << 20


class _Tables:
    """The library's tokenizer with what it has learnt, for one thread at a time."""

    def __init__(self, library: BPETokenizer) -> None:
        self.library = library
        self.seen = 0  # bytes


class GigatokenTokenizer:
    """Encodes as `reference` does, and is it in everything else. Threads may share one.

    at_once: how many threads encode at the same time; each takes tables of 30 MB and more, which are best kept few

    Raises TokenizerError where the library cannot read the vocabulary.
    """

    def __init__(self, reference: TiktokenTokenizer | HuggingFaceTokenizer) -> None:
        self.reference = reference
        self.name = reference.name
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self._load = _loader(reference, self.vocab_size)
        self._idle = [_Tables(self._load())]
        self.allow(1)

    def allow(self, at_once: int) -> None:
        """Let so many threads encode at the same time."""
        self._turns = threading.Semaphore(at_once)

    def encode_flat(
        self, texts: Sequence[str], eod_id: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(ids of all texts back to back, [texts] how many each has); see `tokenizers.encode_flat`."""
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        joined = _BORDER_BYTES.join([*(text.encode("utf-8") for text in texts), b""])
        ids = self._encode(joined)
        borders = np.flatnonzero(ids == self.vocab_size)
        if len(borders) != len(texts):
            return flat_of(self.reference.encode_batch(texts), eod_id)  # a text holds the border itself
        lengths = np.diff(borders, prepend=-1) - 1
        if eod_id is None:
            return ids[ids != self.vocab_size], lengths
        ids[borders] = eod_id
        full = lengths > 0
        if not full.all():
            kept = np.ones(len(ids), dtype=bool)
            kept[borders[~full]] = False
            ids = ids[kept]
        return ids, lengths + full

    def _encode(self, text: bytes) -> NDArray[np.uint32]:
        from gigatoken.gigatoken_rs import BytesSource, PadTruncate

        with self._turns:
            try:
                tables = self._idle.pop()
            except IndexError:
                tables = _Tables(self._load())
            # The one call that leaves other threads running, makes no object for a token and does not import awkward
            # (0.15 s and 50 MB): one row, so that nothing is padded.
            rows, _ = tables.library.encode_batch_padded(BytesSource([text]), PadTruncate(0), parallel=False)
            tables.seen += len(text)
            if tables.seen < _RENEW_BYTES:
                self._idle.append(tables)
        ids: NDArray[np.uint32] = rows[0]
        return ids

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.reference.decode(ids)

    def fingerprint(self) -> str:
        return self.reference.fingerprint()


def load_fast_tokenizer(
    spec: str, special_tokens: SpecialTokens = "plain", encoder: Encoder = "auto"
) -> Tokenizer:
    """`load_tokenizer`, by gigatoken where that is exact.

    encoder: "auto" (gigatoken where it applies, is installed and agrees; says on one line where not), "gigatoken"
        (an error where it does not agree), "reference" (never)
    """
    reference = load_tokenizer(spec, special_tokens)
    if encoder == "reference":
        return reference
    try:
        return _checked(reference, strict=encoder == "auto")
    except TokenizerError as error:
        if encoder == "gigatoken":
            raise
        logger.info("%s: encoded by its own library, not gigatoken: %s", spec, error)
        return reference


def _checked(reference: Tokenizer, strict: bool) -> GigatokenTokenizer:
    """Raises TokenizerError saying why gigatoken cannot take the place of `reference`."""
    if not isinstance(reference, TiktokenTokenizer | HuggingFaceTokenizer):
        raise TokenizerError("it knows byte-level BPE alone")
    if strict and isinstance(reference, HuggingFaceTokenizer):
        _check_division(json.loads(reference.to_json()))
    try:
        fast = GigatokenTokenizer(reference)
    except ImportError:
        raise TokenizerError(
            "it is not installed (pip install 'megatron_lite[data]' gives about ten times the speed)"
        ) from None
    except (ValueError, OSError, KeyError) as error:
        raise TokenizerError(f"it cannot read this vocabulary: {error}") from None
    texts = [*hard_texts(), *reference.special_ids, "a".join(["", *reference.special_ids, ""])]
    check_equal(fast, texts)
    return fast


def check_equal(tokenizer: GigatokenTokenizer, texts: Sequence[str]) -> None:
    """Raise TokenizerError naming a text that gigatoken and the library it stands for encode differently."""
    own = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, own, strict=True):
        expected = tokenizer.reference.encode(text)
        if ids != expected:
            at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
            around = tokenizer.decode(expected[max(at - 5, 0) : at + 5])
            raise TokenizerError(f"it gives other ids than {tokenizer.name} near {around!r}")


def hard_texts() -> list[str]:
    """What tokenizers disagree about: spaces, letters and numbers of all kinds, contractions, control characters."""
    spaces = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2007\u200a\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
    points = [*range(0x700), *range(0x700, 0x3100, 5), *range(0x3100, 0x20000, 97), 0xE0001, 0x10FFFD]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return [
        "",
        *("".join(f"a{one}{two}b{one * 3}{two}\n{one}" for two in spaces) for one in spaces),
        *(
            "x" + " " * count + "\n" * (count % 3) + "y" + " " * count
            for count in (1, 2, 3, 8, 63, 64, 65, 1000)
        ),
        "I'm he'S WE'LL you've 'd 'D'ſ 'K can’t ''s 's's '\ns O'Re",
        "0 1 12 123 1234 12345 1234567890 ½ ² Ⅷ ٣٤٥٦ ४५६७ 一二三 𝟘𝟙𝟚𝟛 1a2b 1.5e-10 1,000,000",
        "e\u0301 a\u0308\u0323 \u0301x क्षि नी \u0e01\u0e33 각 \u1100\u1161\u11a8 Ǆǅǆ ʰ ª",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪 ©️ ☃︎ 𝔘𝔫𝔦 \U0001f9d1\u200d",
        "東京は日本の首都です。 中文,没有空格！한국어 텍스트 ไม่มีช่องว่าง עברית العربية",
        "#include <x>\n\tfor (i=0;i<n;++i) {\r\n\t\ta[i] += 'c';  // --- ===\n}\n\n\n\n   if x:\n        pass",
        "http://a.b/c?d=e&f=%20 __init__ CamelCaseHTTPServer SHOUTING'S A/B\r\n/\n//\n ...!!!\n\n ?",
        "a" * 3000 + "." * 300 + "ab" * 300 + "\u4e00" * 300,
        *(
            "".join(f"a{c}b {c} 1{c}" for c in characters[start : start + 256])
            for start in range(0, len(characters), 256)
        ),
    ]


def _loader(
    reference: TiktokenTokenizer | HuggingFaceTokenizer, border_id: int
) -> Callable[[], BPETokenizer]:
    """What makes the library's tokenizer, out of what is in memory: the file may change during a long run."""
    from gigatoken import gigatoken_rs

    kept = dict(reference.special_ids) if reference.special_tokens == "parse" else {}
    if isinstance(reference, HuggingFaceTokenizer):
        text = _with_border(json.loads(reference.to_json()), kept, border_id)
        return lambda: _byte_level(gigatoken_rs.load_hf_json(text))
    if reference.kind not in _SCHEMES:
        raise TokenizerError(f"it does not know {reference.kind}")
    content, scheme, special = reference.content, _SCHEMES[reference.kind], {**kept, _BORDER: border_id}

    def load() -> BPETokenizer:
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(content)
            file.flush()
            return gigatoken_rs.BPETokenizer.from_tiktoken(file.name, scheme, special)

    return load


def _byte_level(library: Any) -> BPETokenizer:
    from gigatoken.gigatoken_rs import BPETokenizer

    if not isinstance(library, BPETokenizer):
        raise TokenizerError("it knows this vocabulary only by SentencePiece's rules, which are not compared")
    return library


def _with_border(content: dict[str, Any], kept: dict[str, int], border_id: int) -> str:
    """A tokenizer.json whose special tokens are those to be read in texts, and the border."""
    added = [t for t in content.get("added_tokens") or [] if not t.get("special") or t["content"] in kept]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    border = {"id": border_id, "content": _BORDER, **flags, "special": True}
    return json.dumps({**content, "added_tokens": [*added, border], "post_processor": None})


def _check_division(content: dict[str, Any]) -> None:
    """Raise TokenizerError for a tokenizer.json that is not byte-level BPE dividing text in a way that is known."""
    model, division = content["model"], content.get("pre_tokenizer") or {}
    known = model["type"] == "BPE" and not model.get("byte_fallback") and not content.get("normalizer")
    steps = division.get("pretokenizers", []) if division.get("type") == "Sequence" else [division]
    *first, last = steps or [{}]
    known &= last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if first:
        split = first[0].get("pattern", {}).get("Regex") if first[0].get("type") == "Split" else None
        known &= len(first) == 1 and split in _SPLITS and not last.get("use_regex", True)
    else:
        known &= bool(last.get("use_regex", True))
    if not known:
        raise TokenizerError("its rules are not GPT-2's, cl100k's or o200k's (--encoder gigatoken tries)")
