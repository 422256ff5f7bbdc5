"""Training every kind of tokenizer, byte-level BPE first."""

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lite.tokenizers import TokenizerError, load_tokenizer
from megatron_lite.tokenizers.train import KINDS, train_bpe, train_tokenizer

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


TRAINED = [kind for kind in KINDS if kind != "byte"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
SIZES = {"char": 20, "word": 12, "bpe": 280, "sentencepiece-bpe": 300, "sentencepiece-unigram": 282}


@pytest.mark.parametrize("kind", TRAINED)
def test_every_kind_is_loaded_with_its_special_tokens(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    spec, special = train_tokenizer(kind, iter(TEXTS), path, SIZES[kind], SPECIAL)
    tokenizer = load_tokenizer(spec)
    assert tokenizer.vocab_size == SIZES[kind]
    ids = [*special.values(), tokenizer.eod_id]
    assert list(special) == SPECIAL and len(set(ids)) == 3
    assert tokenizer.decode(ids) == "".join([*SPECIAL, "<|endoftext|>"])
    text = "".join([*SPECIAL, "<|endoftext|> cat"])
    assert not set(tokenizer.encode(text)) & set(ids), "names in a text are text"
    assert tokenizer.decode([ids[0], *tokenizer.encode("cat"), ids[1]]) == "<|im_start|>cat<|im_end|>"


@pytest.mark.parametrize("kind", TRAINED)
def test_every_kind_is_trained_the_same_way_again(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(kind, iter(TEXTS), tmp_path / name, SIZES[kind], SPECIAL)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind.startswith("sentencepiece")])
def test_sentencepiece_gives_back_any_text(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer(kind, TEXTS, tmp_path / "m", 320).spec)
    for text in ("", " ", "  two  spaces \n\n\tand ", "ﬁ ² Ωμέγα 🙂\r\n\x00", "a\u00a0b\u3000", *TEXTS[:3]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the cat")) < 6


def test_sentencepiece_trains_on_a_sample_of_long_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines longer than the library takes are cut and not passed over."""
    texts = ["the cat sat on the mat " * 400, "one\ntwo"]
    spec, _ = train_tokenizer("sentencepiece-bpe", texts, tmp_path / "m", 290, lines=1000)
    assert len(load_tokenizer(spec).encode("the cat sat on the mat")) < 12 and not caplog.messages
    train_tokenizer("sentencepiece-bpe", texts * 20, tmp_path / "m", 280, lines=101)
    assert caplog.messages == ["trained on a sample of 101 of 240 lines"]
    with pytest.raises(TokenizerError, match="100 lines are too few"):
        train_tokenizer("sentencepiece-bpe", texts, tmp_path / "m", 280, lines=100)


def test_characters_and_words_without_a_size_are_all_there_are(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer("char", TEXTS, tmp_path / "c").spec)
    assert tokenizer.vocab_size == len(set("".join(TEXTS))) + 2
    tokenizer = load_tokenizer(train_tokenizer("word", TEXTS, tmp_path / "w").spec)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)


def test_the_most_frequent_characters_are_kept(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer("char", ["banana nb"], tmp_path / "c", 5).spec)
    assert tokenizer.encode("abnx") == [0, 1, 2, 3] and tokenizer.vocab_size == 5


def test_bytes_need_nothing(tmp_path: Path) -> None:
    assert train_tokenizer("byte", [], None) == ("byte", {})


@pytest.mark.parametrize("kind", TRAINED)
def test_a_corpus_with_fewer_entries_is_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, _ = train_tokenizer(kind, ["ab ab"], tmp_path / "t", 5000)
    entries = load_tokenizer(spec).vocab_size
    assert caplog.messages == [f"the corpus gives only {entries} of the 5,000 entries asked for"]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("wordpiece", {}, "cannot train wordpiece: take one of char, byte"),
        ("bpe", {}, "bpe needs a vocabulary size"),
        ("char", {"vocab_size": 4, "special_tokens": SPECIAL}, "a vocabulary of 4 cannot hold .* at least 5"),
        (
            "bpe",
            {"vocab_size": 258, "special_tokens": SPECIAL},
            "256 bytes, 2 special tokens and .* at least 259",
        ),
        ("sentencepiece-bpe", {"vocab_size": 258}, "at least 259"),
        ("sentencepiece-unigram", {"vocab_size": 260}, "the characters of this text: at least 277"),
        ("byte", {"special_tokens": SPECIAL}, "takes no special tokens"),
        ("byte", {"vocab_size": 300}, "no size"),
        ("char", {"special_tokens": ["a", "a"]}, "special tokens are different"),
        ("char", {"special_tokens": [""]}, "not empty"),
        ("char", {"special_tokens": ["<|endoftext|>"]}, "there anyway"),
    ],
)
def test_settings_that_cannot_be_met(
    kind: str, arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=message):
        train_tokenizer(kind, TEXTS, tmp_path / "t", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", TRAINED)
def test_bad_input_goes_through_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        raise KeyError("line 61")

    with pytest.raises(KeyError, match="line 61"):
        train_tokenizer(kind, texts(), tmp_path / "t", 300)
    with pytest.raises(TokenizerError, match="no text to train on"):
        train_tokenizer(kind, ["", ""], tmp_path / "t", 300)
    assert list(tmp_path.iterdir()) == []


def test_missing_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match="sentencepiece"):
        train_tokenizer("sentencepiece-bpe", TEXTS, tmp_path / "t", 300)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_file_is_there_whole_or_not_at_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *arguments: object, **options: object) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, full)
    with pytest.raises(TokenizerError, match=f"^{path}: cannot be written: No space left"):
        train_tokenizer(kind, iter(TEXTS), path, SIZES[kind])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
