from pathlib import Path

import pytest

from megatron_lite.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    TokenizerError,
    WordTokenizer,
    load_tokenizer,
)

TEXT = "Naïve café — 東京 🙂\r\n\tTwo  spaces, under_score; don't.\n\n"


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("") == []
    assert tokenizer.decode([97, 256, 0xFF]) == "a<|endoftext|>\ufffd"
    with pytest.raises(TokenizerError, match="id 257 is outside the vocabulary of 257"):
        tokenizer.decode([257])


@pytest.mark.parametrize("kind", [CharTokenizer, WordTokenizer])
def test_trained_tokenizers_come_back_from_their_file(kind: type, tmp_path: Path) -> None:
    trained = kind.train([TEXT, "more"])
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    for spec in (f"{trained.kind}:{path}", str(path)):
        loaded = load_tokenizer(spec)
        assert loaded.name == spec
        assert loaded.encode(TEXT) == trained.encode(TEXT)
        assert loaded.decode(loaded.encode(TEXT)) == TEXT
        assert loaded.fingerprint() == trained.fingerprint()
        assert loaded.encode_batch([TEXT, "", "more"]) == [loaded.encode(t) for t in (TEXT, "", "more")]
    assert trained.vocab_size == len(trained.tokens) + 2
    assert trained.decode([trained.unknown_id, trained.eod_id]) == "\ufffd<|endoftext|>"
    assert trained.fingerprint() != kind.train([TEXT, "other"]).fingerprint()


def test_characters_are_in_code_point_order() -> None:
    tokenizer = CharTokenizer.train(["banana", "\n"])
    assert tokenizer.tokens == ["\n", "a", "b", "n"]
    assert tokenizer.encode("nab!") == [3, 1, 2, tokenizer.unknown_id]


def test_words_are_by_frequency_and_unknown_words_are_one_id() -> None:
    tokenizer = WordTokenizer.train(["the cat the dog", "a cat"], max_tokens=3)
    assert tokenizer.tokens == [" ", "cat", "the"]
    assert tokenizer.encode("the bird") == [2, 0, tokenizer.unknown_id]
    assert WordTokenizer.train(["a, b"]).encode("a,") == [2, 1], "ties by code point: space, comma, a, b"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"type": "word", "tokens": ["a"]}', '{"type": "char", "tokens": [1]}']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a JSON file"):
        load_tokenizer(f"char:{path}")


@pytest.mark.parametrize("tokens", ['["a", "a"]', '["a", ""]'])
def test_a_token_twice_is_refused(tmp_path: Path, tokens: str) -> None:
    (tmp_path / "t.json").write_text(f'{{"type": "char", "tokens": {tokens}}}')
    with pytest.raises(TokenizerError, match="empty or listed twice"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_special_tokens_are_kept_and_count(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"type": "char", "tokens": ["a"], "special": ["<x>", "<y>"]}')
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocab_size == 5 and tokenizer.decode([0, 3, 4]) == "a<x><y>"
    assert tokenizer.fingerprint() != CharTokenizer(["a"]).fingerprint()
    assert tokenizer.fingerprint() == CharTokenizer(["a"], special_tokens=["<x>", "<y>"]).fingerprint()
    for special, message in (
        ('["<x>", "<x>"]', "listed twice"),
        ("[1]", "not a JSON file"),
        ('"<x>"', "not a JSON"),
    ):
        path.write_text(f'{{"type": "char", "tokens": ["a"], "special": {special}}}')
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(str(path))
