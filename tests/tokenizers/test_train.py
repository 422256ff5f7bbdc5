"""Training a byte-level BPE tokenizer."""

import sys
from pathlib import Path

import pytest

from megatron_lite.tokenizers import TokenizerError, load_tokenizer
from megatron_lite.tokenizers.train import train_bpe

pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat", "the other cat", "naïve café — 東京 🙂"] * 20


def test_any_text_round_trips_and_common_words_are_one_token(tmp_path: Path) -> None:
    path = tmp_path / "new/tokenizer.json"
    train_bpe(TEXTS, 280, path)
    tokenizer = load_tokenizer(f"hf:{path}")
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode("the cat")) < len("the cat") // 2
    for text in (*TEXTS[:3], "never seen: Ωμέγα\r\n\t\x00", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod_id not in tokenizer.encode(" ".join(TEXTS))
    assert tokenizer.eod_id is not None and 0 <= tokenizer.eod_id < 280


def test_the_same_texts_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe(iter(TEXTS), 270, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_small_corpus_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    train_bpe(["aa"], 1000, tmp_path / "t.json")
    assert 257 <= load_tokenizer(f"hf:{tmp_path}/t.json").vocab_size < 300


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    train_bpe(TEXTS, 257, tmp_path / "t.json")
    with pytest.raises(TokenizerError, match="a vocabulary of 256 cannot hold the 256 bytes and "):
        train_bpe(TEXTS, 256, tmp_path / "t.json")


def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="tokenizers"):
        train_bpe(TEXTS, 300, tmp_path / "t.json")
