"""OpenAI's byte-pair vocabularies from their .tiktoken files, through `tiktoken`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_lite.tokenizers.base import (
    EOD_TEXT,
    SpecialTokens,
    TokenizerError,
    checked,
    hash_of,
    missing,
    read_bytes,
)

if TYPE_CHECKING:
    from tiktoken import Encoding


class _Vocabulary(NamedTuple):
    """What a .tiktoken file does not say: how text is divided before merging, and the special ids."""

    pattern: str
    special: dict[str, int]


_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CODE = {"<|fim_prefix|>": 0, "<|fim_middle|>": 1, "<|fim_suffix|>": 2}  # counted from the id before them
_KNOWN = {
    "gpt2": _Vocabulary(_GPT2, {EOD_TEXT: 50256}),
    "r50k": _Vocabulary(_GPT2, {EOD_TEXT: 50256}),
    "p50k": _Vocabulary(_GPT2, {EOD_TEXT: 50256}),
    "cl100k": _Vocabulary(
        _CL100K,
        {EOD_TEXT: 100257, "<|endofprompt|>": 100276} | {name: 100258 + i for name, i in _CODE.items()},
    ),
    "o200k": _Vocabulary(_O200K, {EOD_TEXT: 199999, "<|endofprompt|>": 200018}),
}


class TiktokenTokenizer:
    """A .tiktoken file (lines of base64 token and rank) whose name begins with a known vocabulary's.

    kind: that name
    content: of the file
    special_ids: the special tokens' ids by their names, which `special_tokens` "parse" reads in texts
    """

    def __init__(
        self, path: str | Path, name: str | None = None, special_tokens: SpecialTokens = "plain"
    ) -> None:
        try:
            import tiktoken
        except ImportError:
            raise missing("tiktoken", "tiktoken: tokenizers") from None
        self.name = name or f"tiktoken:{path}"
        self.special_tokens = special_tokens
        known = next((key for key in _KNOWN if Path(path).name.startswith(key)), None)
        if known is None:
            raise TokenizerError(
                f"{path}: the name of a .tiktoken file begins with one of {', '.join(_KNOWN)}"
            )
        content = read_bytes(path)
        self._fingerprint = hash_of("tiktoken", known, content)
        pattern, special = _KNOWN[known]
        self.kind, self.content, self.special_ids = known, content, special
        try:
            ranks = {
                base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())
            }
        except ValueError as error:
            raise TokenizerError(f"{path}: not lines of a base64 token and its rank: {error}") from None
        # Not tiktoken's own reader: it keeps a copy by path, and would not see that the file has changed.
        self._encoding: Encoding = tiktoken.Encoding(
            known, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = self._encoding.n_vocab
        self.eod_id = special[EOD_TEXT]
        self._holes = (
            frozenset(range(self.vocab_size)) - frozenset(ranks.values()) - frozenset(special.values())
        )

    def encode(self, text: str) -> list[int]:
        if self.special_tokens == "parse":
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        values = checked(ids, self.vocab_size, self.name)
        return self._encoding.decode([value for value in values if value not in self._holes])

    def fingerprint(self) -> str:
        return self._fingerprint
