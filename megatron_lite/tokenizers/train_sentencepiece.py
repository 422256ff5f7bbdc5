"""Training SentencePiece models, set up so that text comes back as it was."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_lite.tokenizers.base import EOD_TEXT, TokenizerError, missing

logger = logging.getLogger(__name__)

LINES = 2_000_000
"""Lines that are held in memory and trained on, unless told otherwise: some hundred MB of text."""

_MAX_CHARACTERS = 1000  # a longer line is cut: the library passes over those above 4192 bytes without a word
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def train_sentencepiece(
    texts: Iterable[str],
    model: str,
    vocab_size: int,
    path: str | Path,
    special_tokens: Sequence[str] = (),
    lines: int = LINES,
) -> None:
    """Write a .model file for `sentencepiece:PATH`; a small corpus may give fewer entries than `vocab_size`.

    model: "bpe" or "unigram"
    lines: of the texts that are trained on; more are sampled from with a fixed seed

    Identity normalisation, no space put in front, and bytes (line feeds among them) for characters outside the
    vocabulary, which has room for those that make up 99.95% of the text: all text comes back but "▁" (U+2581), which
    the library takes for a space. Ids: 0 unknown, 1 end of document, the special tokens, 256 bytes, the rest.

    Raises TokenizerError for a vocabulary that is too small, or where the library is missing; what `texts` raises
    goes through.
    """
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError:
        raise missing("sentencepiece", "training a SentencePiece model") from None
    if lines <= 100:
        raise TokenizerError(f"{lines} lines are too few: SentencePiece takes more than 100")
    source = _Lines(texts)
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(source),
            model_writer=written,
            model_type=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOD_TEXT,
            control_symbols=list(special_tokens),
            input_sentence_size=lines,
            shuffle_input_sentence=True,
            num_threads=4,  # of any machine: sums of another number of threads would differ
            minloglevel=2,
        )
    except RuntimeError as error:
        if source.failure is not None:
            raise source.failure from None
        needed = _TOO_SMALL.search(str(error))
        if needed:
            raise TokenizerError(
                f"a vocabulary of {vocab_size} cannot hold the 256 bytes, the special tokens and the characters of "
                f"this text: at least {needed[1]}"
            ) from None
        raise TokenizerError(f"SentencePiece could not be trained: {error}") from None
    if source.failure is not None:
        raise source.failure
    Path(path).write_bytes(written.getvalue())
    if source.count > lines:
        logger.warning("trained on a sample of %s of %s lines", f"{lines:,}", f"{source.count:,}")


class _Lines:
    """The lines of texts, counted. An exception ends them and is kept: the library would turn it into its own."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    for start in range(0, len(line), _MAX_CHARACTERS):
                        self.count += 1
                        yield line[start : start + _MAX_CHARACTERS]
        except Exception as error:
            self.failure = error
