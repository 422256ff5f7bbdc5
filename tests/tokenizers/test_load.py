"""Every kind of specification on real vocabularies and real text."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_lite.config import TOKENIZER_KINDS
from megatron_lite.tokenizers import Tokenizer, TokenizerError, load, load_tokenizer

# specification ({} is the folder of vocabularies), vocabulary, eod
REAL = [
    ("byte", 257, 256),
    ("gpt2:{}", 50257, 50256),
    ("gpt2:{}/gpt2", 50257, 50256),
    ("gpt2:{}/gpt2-", 50257, 50256),
    ("hf:{}/gpt2-tokenizer.json", 50257, 50256),
    ("{}/gpt2-tokenizer.json", 50257, 50256),
    ("tiktoken:{}/r50k_base.tiktoken", 50257, 50256),
    ("{}/cl100k_base.tiktoken", 100277, 100257),
    ("sentencepiece:{}/mistral-v1-32000.model", 32000, 2),
]
TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock.\n",
    "  leading and trailing  \n\n\n",
    "Ünïcödé, 東京, Привет, 🙂👩‍👩‍👧, \u00a0\u2003\u200b",
    "def f(x):\n\treturn x  # tab\r\n",
    "<|endoftext|></s><s><unk>[EOS]",
    "a\x00b\x7f",
]


@pytest.fixture(scope="module")
def folder(real_data: Path) -> Path:
    return real_data / "tokenizers"


@pytest.fixture(scope="module", params=REAL, ids=lambda real: real[0])
def loaded(request: pytest.FixtureRequest, folder: Path) -> tuple[Tokenizer, int, int]:
    spec, vocabulary, eod = request.param
    return load_tokenizer(spec.format(folder)), vocabulary, eod


def test_sizes(loaded: tuple[Tokenizer, int, int]) -> None:
    tokenizer, vocabulary, eod = loaded
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (vocabulary, eod)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_and_special_names_are_text(loaded: tuple[Tokenizer, int, int], text: str) -> None:
    tokenizer, _, eod = loaded
    ids = tokenizer.encode(text)
    assert all(type(number) is int for number in ids)
    assert tokenizer.decode(ids) == text
    assert eod not in ids
    assert (ids == []) == (text == "")


def test_real_text_comes_back(loaded: tuple[Tokenizer, int, int], real_data: Path) -> None:
    tokenizer = loaded[0]
    text = (real_data / "text" / "botchan.txt").read_text(encoding="utf-8")[:50_000]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_its_texts(loaded: tuple[Tokenizer, int, int]) -> None:
    tokenizer = loaded[0]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_eod_reads_by_its_name_and_outside_ids_are_refused(loaded: tuple[Tokenizer, int, int]) -> None:
    tokenizer, vocabulary, eod = loaded
    ids = tokenizer.encode("one")
    assert tokenizer.decode([*ids, eod, *ids]) in ("one<|endoftext|>one", "one</s>one")
    for outside in (vocabulary, -1):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.decode([outside])


def test_every_id_of_the_vocabulary_decodes(loaded: tuple[Tokenizer, int, int]) -> None:
    """A model may sample any id below vocab_size, holes of the vocabulary included."""
    tokenizer, vocabulary, _ = loaded
    for number in [*range(0, vocabulary, 997), *range(vocabulary - 30, vocabulary)]:
        assert isinstance(tokenizer.decode([number]), str)


def test_the_three_ways_to_gpt2_agree(folder: Path, real_data: Path) -> None:
    text = (real_data / "text" / "tinyshakespeare.txt").read_text()[:30_000] + "".join(TEXTS)
    specs = ("gpt2:{}", "hf:{}/gpt2-tokenizer.json", "tiktoken:{}/r50k_base.tiktoken")
    first, *others = (load_tokenizer(spec.format(folder)).encode(text) for spec in specs)
    assert all(other == first for other in others)


def test_known_ids(folder: Path) -> None:
    """As published for these vocabularies."""
    assert load_tokenizer(f"gpt2:{folder}").encode("Hello world") == [15496, 995]
    assert load_tokenizer(f"{folder}/cl100k_base.tiktoken").encode("hello world") == [15339, 1917]


def test_fingerprints_are_of_the_content(folder: Path, tmp_path: Path) -> None:
    for name in ("gpt2-tokenizer.json", "r50k_base.tiktoken", "mistral-v1-32000.model"):
        shutil.copy(folder / name, tmp_path / name)
        assert (
            load_tokenizer(str(tmp_path / name)).fingerprint()
            == load_tokenizer(f"{folder}/{name}").fingerprint()
        )
    lines = (folder / "r50k_base.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "r50k_base.tiktoken").write_bytes(b"".join(lines[:-1]))
    changed = load_tokenizer(str(tmp_path / "r50k_base.tiktoken"))
    assert changed.fingerprint() != load_tokenizer(f"{folder}/r50k_base.tiktoken").fingerprint()


def test_every_byte_of_a_small_vocabulary_works_without_files_from_elsewhere(tmp_path: Path) -> None:
    """vocab.json and merges.txt of our own making: bytes in GPT-2's spelling and two merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "th", "the", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    for spec in (f"gpt2:{tmp_path}", str(tmp_path)):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.encode("the") == [257] and tokenizer.eod_id == 258
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_stands_for_the_tokenizer_json_in_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

    Library(BPE({"a": 0, "b": 1, "</s>": 2}, [])).save(str(tmp_path / "tokenizer.json"))
    for spec in (f"hf:{tmp_path}", str(tmp_path), f"hf:{tmp_path}/tokenizer.json"):
        tokenizer = load_tokenizer(spec)
        assert (tokenizer.encode("ba"), tokenizer.eod_id) == ([1, 0], 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"empty/tokenizer\.json: cannot be read"):
        load_tokenizer(f"hf:{tmp_path}/empty")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bytes", 'unknown tokenizer "bytes"'),
        ("magic:x", "unknown tokenizer"),
        ("hf:absent.json", "absent.json: cannot be read"),
        ("absent.json", "absent.json: cannot be read"),
        ("char:absent.json", "cannot be read"),
        ("gpt2:absent", "no encoder.json and vocab.bpe or vocab.json and merges.txt"),
        ("tiktoken:absent.tiktoken", "begins with one of gpt2, r50k"),
        ("tiktoken:r50k_absent", "cannot be read"),
        ("absent.model", "cannot be read"),
    ],
)
def test_what_cannot_be_loaded_is_named(spec: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(spec)


@pytest.mark.parametrize("name", ["x.json", "x.model", "r50k_x.tiktoken"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"not": "this"}')
    with pytest.raises(TokenizerError, match=f"{name}: not"):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
    ("package", "spec"),
    [
        ("tokenizers", "x.json"),
        ("tokenizers", "gpt2:x"),
        ("tiktoken", "r50k.tiktoken"),
        ("sentencepiece", "x.model"),
    ],
)
def test_a_missing_library_is_named(
    package: str, spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TokenizerError, match=f"pip install {package}"):
        load_tokenizer(spec)


def test_kinds_are_those_of_the_settings() -> None:
    assert tuple(load._LOADERS) == TOKENIZER_KINDS
