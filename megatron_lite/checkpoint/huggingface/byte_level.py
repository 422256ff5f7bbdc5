"""tokenizer.json of vocabularies of byte strings: plain bytes, and OpenAI's .tiktoken files.

The format is that of the `tokenizers` library (BPE behind ByteLevel): bytes are letters, as in GPT-2's vocabulary, and
merges stand for ranks.
"""

from __future__ import annotations

import base64
from typing import Any

from megatron_lite.tokenizers import ByteTokenizer
from megatron_lite.tokenizers.openai import TiktokenTokenizer

# How text is divided first, as the tokenizer.json files of these vocabularies have it: the regular expressions of the
# .tiktoken side use quantifiers that mean something else here.
_SPLITS = {
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}


def of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """tokenizer.json of the byte tokenizer: a vocabulary without a merge."""
    ranks = {bytes((byte,)): byte for byte in range(256)}
    return _tokenizer(
        ranks, {tokenizer.decode([tokenizer.eod_id]): tokenizer.eod_id}, _level(use_regex=False)
    )


def of_tiktoken(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """tokenizer.json of a .tiktoken file; seconds for 100,000 tokens."""
    lines = map(bytes.split, tokenizer.content.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    division = _level(use_regex=True)  # GPT-2's
    if tokenizer.kind in _SPLITS:
        pattern = {"Regex": _SPLITS[tokenizer.kind]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        division = {"type": "Sequence", "pretokenizers": [split, _level(use_regex=False)]}
    return _tokenizer(ranks, tokenizer.special_ids, division)


def _level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _tokenizer(ranks: dict[bytes, int], special: dict[str, int], division: dict[str, Any]) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    vocabulary = {_letters(token): rank for token, rank in ranks.items()}
    pairs = [_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name} | flags for name, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": division,
        "post_processor": None,
        "decoder": _level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is one, however merges would get there
            "vocab": vocabulary | special,
            "merges": [" ".join(map(_letters, parts)) for parts in pairs if len(parts) == 2],
        },
    }


def _letters(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What `token` is merged from, last: two parts, where merges of lower rank get there."""
    parts = [bytes((byte,)) for byte in token]
    while len(parts) > 2:
        found = [ranks.get(parts[at] + parts[at + 1], ranks[token]) for at in range(len(parts) - 1)]
        lowest = min(found)
        if lowest >= ranks[token]:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
