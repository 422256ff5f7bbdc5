"""gigatoken gives the ids of the libraries it stands for, or is not taken."""

import json
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.tokenizers import Tokenizer, TokenizerError, encode_flat, load_tokenizer
from megatron_lite.tokenizers import gigatoken as module
from megatron_lite.tokenizers.gigatoken import (
    GigatokenTokenizer,
    check_equal,
    hard_texts,
    load_fast_tokenizer,
)
from megatron_lite.tokenizers.train import train_bpe

pytest.importorskip("gigatoken")
REAL = [
    "tiktoken:{}/r50k_base.tiktoken",
    "tiktoken:{}/cl100k_base.tiktoken",
    "gpt2:{}",
    "hf:{}/gpt2-tokenizer.json",
]
TEXTS = ["one two", "", "<|endoftext|>", "  ", "", "it's 1234\n\n", "東京 🙂"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer.json of GPT-2's kind, made here."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["the cat sat on the mat, it's 1234 and  12 東京"] * 3, 300, path)
    return f"hf:{path}"


@pytest.fixture(scope="module", params=REAL, ids=lambda spec: spec)
def real(request: pytest.FixtureRequest, real_data: Path) -> GigatokenTokenizer:
    fast = load_fast_tokenizer(request.param.format(real_data / "tokenizers"))
    assert isinstance(fast, GigatokenTokenizer)
    return fast


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky = st.text(
    st.sampled_from(" \t\n\r\v\xa0\u2028'sSltdveram0189½²٣aAǅʰé\u0301\u200d🙂東한<|endoftext|>/_-."),
    max_size=60,
)


@settings(max_examples=150)
@given(text=st.one_of(anything, tricky))
def test_random_text_has_the_same_ids(real: GigatokenTokenizer, text: str) -> None:
    assert real.encode(text) == real.reference.encode(text)


@settings(max_examples=50)
@given(texts=st.lists(st.one_of(anything, tricky)), eod=st.sampled_from([None, 7]))
def test_batches_are_their_texts(real: GigatokenTokenizer, texts: list[str], eod: int | None) -> None:
    ids, lengths = real.encode_flat(texts, eod)
    expected = [real.reference.encode(text) for text in texts]
    if eod is not None:
        expected = [[*own, eod] if own else [] for own in expected]
    assert ids.tolist() == [number for own in expected for number in own] and lengths.tolist() == [
        len(own) for own in expected
    ]


def test_real_text_has_the_same_ids(real: GigatokenTokenizer, real_data: Path) -> None:
    check_equal(real, [path.read_text()[:200_000] for path in (real_data / "text").iterdir()])
    assert real.encode_batch(TEXTS) == real.reference.encode_batch(TEXTS)
    assert real.vocab_size == real.reference.vocab_size and real.decode([0]) == real.reference.decode([0])
    assert real.fingerprint() == real.reference.fingerprint()


@pytest.mark.parametrize("eod", [None, 3])
def test_flat_arrays_are_the_same_from_every_tokenizer(small: str, eod: int | None) -> None:
    fast = load_fast_tokenizer(small)
    assert isinstance(fast, GigatokenTokenizer)
    for texts in (TEXTS, [], [""], ["", ""], ["a"]):
        one, two = (encode_flat(tokenizer, texts, eod) for tokenizer in (fast, fast.reference))
        assert one[0].tolist() == two[0].tolist() and one[1].tolist() == two[1].tolist()
        assert len(one[1]) == len(texts) and one[1].dtype == np.int64


def test_special_tokens_are_text_unless_they_are_parsed(small: str) -> None:
    plain, parsed = (load_fast_tokenizer(small, kind) for kind in ("plain", "parse"))
    assert isinstance(plain, GigatokenTokenizer) and isinstance(parsed, GigatokenTokenizer)
    text = "a<|endoftext|>b<|endoftext|><|endoftext|>"
    assert plain.eod_id not in plain.encode(text) and plain.decode(plain.encode(text)) == text
    assert parsed.encode(text).count(parsed.eod_id or 0) == 3
    with pytest.raises(TokenizerError, match="read no special tokens"):
        load_tokenizer("byte", "parse")


def test_real_special_tokens_are_parsed_alike(real_data: Path) -> None:
    for spec in REAL[1:3]:
        parsed = load_fast_tokenizer(spec.format(real_data / "tokenizers"), "parse")
        assert isinstance(parsed, GigatokenTokenizer)
        ids = parsed.encode("a <|endoftext|> b<|endoftext|>")
        assert ids == parsed.reference.encode("a <|endoftext|> b<|endoftext|>")
        assert ids.count(parsed.eod_id or 0) == 2


def test_threads_share_one_and_it_starts_anew(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RENEW_BYTES", 500)
    fast = load_fast_tokenizer(small)
    assert isinstance(fast, GigatokenTokenizer)
    made, load = [], fast._load
    fast.allow(2)
    fast._load = lambda: made.append(threading.get_ident()) or load()  # type: ignore[func-returns-value]
    texts = [f"the cat {number}" * 20 for number in range(50)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(fast.encode, texts)) == [fast.reference.encode(text) for text in texts]
    assert len(made) > 10


@pytest.mark.parametrize("eod", [None, 3])
def test_a_text_with_the_border_in_it_is_not_cut_there(small: str, eod: int | None) -> None:
    fast = load_fast_tokenizer(small)
    assert isinstance(fast, GigatokenTokenizer)
    texts = ["a", "", f"b{module._BORDER}c", module._BORDER * 2]
    for found, expected in zip(
        fast.encode_flat(texts, eod), encode_flat(fast.reference, texts, eod), strict=True
    ):
        assert found.tolist() == expected.tolist()


def test_a_difference_is_found_and_named(small: str) -> None:
    fast = load_fast_tokenizer(small)
    assert isinstance(fast, GigatokenTokenizer)
    with pytest.raises(TokenizerError, match=r"gives other ids than hf:.* near 'the'"):
        fast.reference = _Off(fast.reference)  # type: ignore[assignment]
        check_equal(fast, ["", "the"])


class _Off:
    """A reference whose first id is another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = tokenizer.name

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        return ids[:1] * 2 + ids[1:]

    def decode(self, ids: list[int]) -> str:
        return "the"


def test_what_it_may_not_encode_is_encoded_by_its_own_library(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    content = json.loads(Path(small.removeprefix("hf:")).read_text())
    changes = {
        "digits": {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]],
            }
        },
        "prefix": {"pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": True}},
        "lower": {"normalizer": {"type": "Lowercase"}},
        "none": {"pre_tokenizer": None},
    }
    for name, change in changes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content | change))
        caplog.clear()
        tokenizer = load_fast_tokenizer(f"hf:{tmp_path}/{name}.json")
        assert not isinstance(tokenizer, GigatokenTokenizer) and "not gigatoken: its rules" in caplog.text, (
            name
        )
    for spec, encoder in ((small, "reference"), ("byte", "auto")):
        assert not isinstance(load_fast_tokenizer(spec, encoder=encoder), GigatokenTokenizer)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="byte-level BPE alone"):
        load_fast_tokenizer("byte", encoder="gigatoken")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert not isinstance(load_fast_tokenizer(small), GigatokenTokenizer) and "not installed" in caplog.text


def test_hard_texts_are_many_and_cheap() -> None:
    texts = hard_texts()
    assert len(set("".join(texts))) > 3000 and sum(len(text.encode()) for text in texts) < 100_000


@pytest.mark.parametrize("split", module._SPLITS, ids=["cl100k", "o200k"])
def test_a_tokenizer_json_of_the_newer_kinds_is_encoded_alike(small: str, tmp_path: Path, split: str) -> None:
    content = json.loads(Path(small.removeprefix("hf:")).read_text())
    isolated = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    steps = [isolated, {**content["pre_tokenizer"], "use_regex": False}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    fast = load_fast_tokenizer(f"hf:{tmp_path}")
    assert isinstance(fast, GigatokenTokenizer)
    check_equal(fast, ["the cat's SAT on the 12345 mat!!\n\n  It's", *TEXTS])
