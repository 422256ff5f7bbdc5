"""SentencePiece models (BPE or unigram)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lite.tokenizers.base import TokenizerError, checked, hash_of, missing, read_bytes


class SentencePieceTokenizer:
    """A SentencePiece .model file; its </s>, where it has one, ends documents.

    Text comes back as the model normalises it: exactly, where it was trained with identity normalisation.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise missing("sentencepiece", "sentencepiece: tokenizers") from None
        self.name = name or f"sentencepiece:{path}"
        content = read_bytes(path)
        self._fingerprint = hash_of("sentencepiece", content)
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise TokenizerError(f"{path}: not a SentencePiece model") from None
        self.vocab_size = int(self._model.vocab_size())
        self.unknown_id = int(self._model.unk_id())
        eos = int(self._model.eos_id())
        self.eod_id = eos if eos >= 0 else None

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: corpus encoding has its own processes.
        return list(self._model.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        values = checked(ids, self.vocab_size, self.name)
        parts: list[str] = []
        text: list[int] = []
        for value, special in zip(values, self._model.is_control(values), strict=True):
            if special:
                parts += (self._model.decode(text), self._model.id_to_piece(value))
                text = []
            else:
                text.append(value)
        return "".join([*parts, self._model.decode(text)])

    def fingerprint(self) -> str:
        return self._fingerprint
