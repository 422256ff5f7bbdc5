"""Training a tokenizer of any kind that `load_tokenizer` takes. The same texts in the same order give the same file.

Every vocabulary holds the end-of-document token and the special tokens asked for. They are ids that no text encodes to:
their names in a text are letters as any others.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megatron_lite.tokenizers.base import EOD_TEXT, TokenizerError, missing
from megatron_lite.tokenizers.load import load_tokenizer
from megatron_lite.tokenizers.simple import CharTokenizer, WordTokenizer
from megatron_lite.tokenizers.train_sentencepiece import LINES, train_sentencepiece

logger = logging.getLogger(__name__)

KINDS = ("char", "byte", "word", "bpe", "sentencepiece-bpe", "sentencepiece-unigram")


class Trained(NamedTuple):
    """spec: for `load_tokenizer`; special: ids of the special tokens by name"""

    spec: str
    special: dict[str, int]


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    path: str | Path | None,
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = (),
    lines: int = LINES,
) -> Trained:
    """Train a tokenizer of one of KINDS on `texts` and write it to `path`.

    vocab_size: all its entries, end of document, unknown and special ones among them. None: every character (char) or
        word (word) of the texts. A corpus that gives fewer is a warning.
    lines: of the texts that SentencePiece looks at; more are sampled from, evenly

    "byte" needs no training and writes nothing. Raises TokenizerError for settings that cannot be met, before `texts`
    is begun where that can be known; what `texts` raises goes through.
    """
    check_settings(kind, path, vocab_size, special_tokens)
    if kind == "byte":
        return Trained("byte", {})
    assert path is not None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    texts = _not_empty(texts)
    with _written_beside(path) as place:
        if kind == "char":
            characters = _characters(texts, vocab_size, special_tokens)
            char = CharTokenizer(characters, special_tokens=special_tokens)
            char.save(place)
            trained = Trained(f"char:{path}", char.special_ids)
        elif kind == "word":
            most = None if vocab_size is None else vocab_size - 2 - len(special_tokens)
            word = WordTokenizer(WordTokenizer.train(texts, most).tokens, special_tokens=special_tokens)
            word.save(place)
            trained = Trained(f"word:{path}", word.special_ids)
        elif kind == "bpe":
            assert vocab_size is not None
            train_bpe(texts, vocab_size, place, special_tokens)
            trained = Trained(f"hf:{path}", {name: 1 + i for i, name in enumerate(special_tokens)})
        else:
            assert vocab_size is not None
            model = kind.removeprefix("sentencepiece-")
            train_sentencepiece(texts, model, vocab_size, place, special_tokens, lines)
            trained = Trained(f"sentencepiece:{path}", {name: 2 + i for i, name in enumerate(special_tokens)})
    entries = load_tokenizer(trained.spec).vocab_size
    if vocab_size is not None and entries < vocab_size:
        logger.warning(
            "the corpus gives only %s of the %s entries asked for", f"{entries:,}", f"{vocab_size:,}"
        )
    return trained


@contextmanager
def _written_beside(path: str | Path) -> Iterator[Path]:
    """Where to write what shall be `path`: it is there whole, or what was there before is untouched."""
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary):  # of what `texts` reads
            raise
        raise TokenizerError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_settings(
    kind: str, path: str | Path | None, vocab_size: int | None, special_tokens: Sequence[str]
) -> None:
    """Raises TokenizerError for what no corpus could repair."""
    if kind not in KINDS:
        raise TokenizerError(f"cannot train {kind}: take one of {', '.join(KINDS)}")
    names = [EOD_TEXT, *special_tokens]
    if "" in names or len(set(names)) < len(names):
        raise TokenizerError(
            f"special tokens are different, not empty, and {EOD_TEXT} is there anyway: {', '.join(special_tokens)}"
        )
    if kind == "byte":
        if special_tokens or vocab_size not in (None, 257):
            raise TokenizerError(
                "byte is 257 entries and needs no training: it takes no special tokens and no size"
            )
        return
    if path is None:
        raise TokenizerError(f"a file to write the {kind} tokenizer to is needed")
    if vocab_size is None:
        if kind not in ("char", "word"):
            raise TokenizerError(f"{kind} needs a vocabulary size")
        return
    fixed = 3 if kind in ("char", "word") else 257 if kind == "bpe" else 259
    if vocab_size < fixed + len(special_tokens):
        holds = "an entry, unknown" if fixed == 3 else "the 256 bytes"
        special = f", {len(special_tokens)} special tokens" if special_tokens else ""
        raise TokenizerError(
            f"a vocabulary of {vocab_size} cannot hold {holds}{special} and {EOD_TEXT}: at least "
            f"{fixed + len(special_tokens)}"
        )


def train_bpe(
    texts: Iterable[str], vocab_size: int, path: str | Path, special_tokens: Sequence[str] = ()
) -> None:
    """Learns byte-level BPE (GPT-2's kind: any text round-trips) and writes a tokenizer.json for `hf:PATH`.

    vocab_size: entries wanted, the 256 bytes and the end-of-document token among them; a small corpus may give
        fewer.

    Raises TokenizerError for a vocabulary below 257, or where the library is missing.
    """
    check_settings("bpe", path, vocab_size, special_tokens)
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing("tokenizers", "training a BPE tokenizer") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TEXT, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # (Tokenizer.save raises bare Exceptions where it cannot write.)
    Path(path).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _characters(texts: Iterable[str], vocab_size: int | None, special_tokens: Sequence[str]) -> list[str]:
    """All characters, or the most frequent ones, in code point order."""
    if vocab_size is None:
        return CharTokenizer.train(texts).tokens
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(ranked[: vocab_size - 2 - len(special_tokens)])


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, the first of them already there. Raises TokenizerError where there is none."""
    iterator = (text for text in texts if text)
    first = next(iterator, None)
    if first is None:
        raise TokenizerError("no text to train on")
    return chain((first,), iterator)
