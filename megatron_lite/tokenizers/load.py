"""From a specification in a config or on a command line to a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_lite.tokenizers.base import SpecialTokens, Tokenizer, TokenizerError, read_bytes
from megatron_lite.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lite.tokenizers.openai import TiktokenTokenizer
from megatron_lite.tokenizers.simple import ByteTokenizer, CharTokenizer, WordTokenizer
from megatron_lite.tokenizers.spm import SentencePieceTokenizer

# The kinds of `config.TOKENIZER_KINDS`, which is not imported: settings take 0.1 s to load.
_LOADERS: dict[str, Callable[[str, str], Tokenizer]] = {
    "char": CharTokenizer.load,
    "word": WordTokenizer.load,
    "gpt2": HuggingFaceTokenizer.load_gpt2,
    "hf": HuggingFaceTokenizer.load,
    "tiktoken": TiktokenTokenizer,
    "sentencepiece": SentencePieceTokenizer,
}
_ENDINGS = {".model": "sentencepiece", ".tiktoken": "tiktoken"}


# Of those that can read special tokens in a text.
_PARSERS: dict[str, Callable[[str, str, SpecialTokens], Tokenizer]] = {
    "gpt2": HuggingFaceTokenizer.load_gpt2,
    "hf": HuggingFaceTokenizer.load,
    "tiktoken": TiktokenTokenizer,
}


def load_tokenizer(spec: str, special_tokens: SpecialTokens = "plain") -> Tokenizer:
    """The tokenizer that `spec` names.

    spec: byte, char:FILE, word:FILE, gpt2:FOLDER_OR_PREFIX, hf:FOLDER_OR_FILE (tokenizer.json),
        tiktoken:FILE, sentencepiece:FILE, or a path alone, whose kind is seen from its ending and content
    special_tokens: "parse" turns special tokens' names in a text into their ids

    Raises TokenizerError for an unknown kind, a missing or damaged file, or a library that is not installed.
    """
    kind, separator, path = spec.partition(":")
    if spec != "byte" and (not separator or kind not in _LOADERS):
        kind, path = _kind_of(spec), spec
    if special_tokens == "parse":
        if kind not in _PARSERS:
            raise TokenizerError(
                f"{spec}: {kind} tokenizers read no special tokens in texts; leave them plain"
            )
        return _PARSERS[kind](path, spec, special_tokens)
    if spec == "byte":
        return ByteTokenizer()
    return _LOADERS[kind](path, spec)


def _kind_of(spec: str) -> str:
    path = Path(spec)
    if path.suffix in _ENDINGS:
        return _ENDINGS[path.suffix]
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return "hf"
        return "gpt2"
    if path.suffix == ".json":
        try:
            content = json.loads(read_bytes(path))
        except ValueError as error:
            raise TokenizerError(f"{spec}: not JSON: {error}") from None
        kind = content.get("type") if isinstance(content, dict) else None
        return kind if kind in ("char", "word") else "hf"
    kinds = ", ".join(f"{kind}:FILE" for kind in _LOADERS)
    raise TokenizerError(f'unknown tokenizer "{spec}": take byte, {kinds}, or the path of such a file')
