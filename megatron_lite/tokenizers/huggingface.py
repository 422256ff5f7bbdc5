"""Any tokenizer.json, and GPT-2's pair of files, through the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

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
    from tokenizers import Tokenizer as Library

# The names under which known vocabularies keep the token that ends a document, most specific first.
_EOD_NAMES = (EOD_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|eos|>", "[EOS]")
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, told to leave special tokens in the text alone.

    special_ids: the special tokens' ids by their names, which `special_tokens` "parse" reads in texts
    adds_tokens: whether the library by itself would put special tokens around a text; here it never does
    """

    def __init__(
        self, library: Library, name: str, fingerprint: str, special_tokens: SpecialTokens = "plain"
    ) -> None:
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = special_tokens == "plain"
        self.special_tokens = special_tokens
        self.special_ids = {
            token.content: number
            for number, token in library.get_added_tokens_decoder().items()
            if token.special
        }
        self.adds_tokens = library.num_special_tokens_to_add(False) > 0
        self.name = name
        self._library = library
        self._fingerprint = fingerprint
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.unknown_id = vocabulary.get(getattr(library.model, "unk_token", None) or "")
        self.eod_id = next((vocabulary[eod] for eod in _EOD_NAMES if eod in vocabulary), None)

    @classmethod
    def load(
        cls, path: str | Path, name: str | None = None, special_tokens: SpecialTokens = "plain"
    ) -> HuggingFaceTokenizer:
        """Read a tokenizer.json, or the one in a folder. Raises TokenizerError where it is none."""
        library = _import()
        if Path(path).is_dir():
            path = Path(path) / "tokenizer.json"
        content = read_bytes(path)
        try:
            tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer.json: {error}") from None
        return cls(tokenizer, name or f"hf:{path}", hash_of("hf", content), special_tokens)

    @classmethod
    def load_gpt2(
        cls, where: str | Path, name: str | None = None, special_tokens: SpecialTokens = "plain"
    ) -> HuggingFaceTokenizer:
        """GPT-2's byte-level BPE from encoder.json and vocab.bpe, or vocab.json and merges.txt.

        where: their folder, or what stands before these names in the paths ("models/gpt2-"), or both paths with a
            comma between ("a/vocab.json,b/merges.txt")
        """
        library = _import()
        vocabulary_path, merges_path = find_gpt2_files(where)
        vocabulary_text, merges_text = read_bytes(vocabulary_path), read_bytes(merges_path)
        try:
            vocabulary = json.loads(vocabulary_text)
            lines = merges_text.decode("utf-8").splitlines()
            pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
            tokenizer = library.Tokenizer(library.models.BPE(vocabulary, pairs))
        except Exception as error:
            raise TokenizerError(
                f"{vocabulary_path}, {merges_path}: not a GPT-2 vocabulary: {error}"
            ) from None
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        if special_tokens == "parse" and EOD_TEXT in vocabulary:
            tokenizer.add_special_tokens([EOD_TEXT])
        fingerprint = hash_of("gpt2", vocabulary_text, merges_text)
        return cls(tokenizer, name or f"gpt2:{where}", fingerprint, special_tokens)

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        values = checked(ids, self.vocab_size, self.name)
        return str(self._library.decode(values, skip_special_tokens=False))

    def fingerprint(self) -> str:
        return self._fingerprint

    def to_json(self) -> str:
        """A tokenizer.json of it."""
        return str(self._library.to_str())


def find_gpt2_files(where: str | Path) -> tuple[Path, Path]:
    """(vocabulary, merges) in a folder or behind a prefix. Raises TokenizerError naming what was looked
    for."""
    base = str(where)
    if "," in base:
        first, second = map(Path, base.split(",", 1))
        if first.is_file() and second.is_file():
            return first, second
    beginnings = [f"{base}/", f"{base}/gpt2-"] if Path(where).is_dir() else [base, f"{base}-"]
    for beginning in beginnings:
        for names in _GPT2_FILES:
            vocabulary, merges = (Path(beginning + name) for name in names)
            if vocabulary.is_file() and merges.is_file():
                return vocabulary, merges
    wanted = " or ".join(" and ".join(names) for names in _GPT2_FILES)
    raise TokenizerError(
        f"gpt2:{where}: no {wanted} there (looked for {', '.join(b + '…' for b in beginnings)})"
    )


def _import() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise missing("tokenizers", "hf: and gpt2: tokenizers") from None
    return tokenizers
