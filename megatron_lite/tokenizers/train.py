"""Training a byte-level BPE tokenizer with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_lite.tokenizers.base import EOD_TEXT, TokenizerError, missing


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Learns byte-level BPE (GPT-2's kind: any text round-trips) and writes a tokenizer.json for `hf:PATH`.

    vocab_size: entries wanted, the 256 bytes and the end-of-document token among them; a small corpus may give
        fewer.

    Raises TokenizerError for a vocabulary below 257, or where the library is missing.
    """
    if vocab_size < 257:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and {EOD_TEXT}: at least 257"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing("tokenizers", "training a BPE tokenizer") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
