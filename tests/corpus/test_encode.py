import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.corpus import CorpusError, EncodeSettings, Progress, chunk_encoder, encode_corpus
from megatron_lite.data import DatasetError, IndexedDataset, read_sidecar
from megatron_lite.data.sidecar import Checksums
from megatron_lite.tokenizers import CharTokenizer, TokenizerError, load_tokenizer
from megatron_lite.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lite.tokenizers.train import train_bpe

TEXTS = ["first", "", "ünï 🙂", "<|endoftext|>", "last\n"]


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_are_written_in_order(tmp_path: Path, append_eod: bool) -> None:
    path = write_lines(tmp_path / "x.jsonl", TEXTS)
    stats = encode_corpus([path, path], tmp_path / "o" / "x", EncodeSettings("byte", append_eod=append_eod))
    dataset = IndexedDataset(tmp_path / "o" / "x_text_document")
    eod = [256] if append_eod else []
    expected = [[*text.encode(), *eod] for text in TEXTS * 2 if text]
    assert [sequence.tolist() for sequence in dataset] == expected
    assert dataset.num_documents == 10 and dataset.dtype == np.uint16
    assert dataset.document_bounds.tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    counts = stats.keys["text"]
    assert (stats.read, counts.written, counts.empty, stats.rejected) == (10, 8, 2, 0)
    assert counts.tokens == dataset.num_tokens == sum(map(len, expected))
    assert stats.input_bytes == 2 * path.stat().st_size


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    texts = [f"document {number} " * (number % 17) for number in range(400)]
    path = write_lines(tmp_path / "x.jsonl", texts)
    settings = EncodeSettings("byte", append_eod=True)
    for workers in (1, 3):
        encode_corpus([path], tmp_path / f"w{workers}", settings, workers=workers, chunk_bytes=999)
    encode_corpus([path], tmp_path / "one_chunk", settings)
    first = read(tmp_path / "w1_text_document")
    assert first == read(tmp_path / "w3_text_document") == read(tmp_path / "one_chunk_text_document")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good"] * 50)
    with open(path, "ab") as file:
        file.write(b'{"text": "cut\n{"text": null}\n')
    (tmp_path / "o").mkdir()
    with pytest.raises(CorpusError) as caught:
        encode_corpus([path], tmp_path / "o" / "x", "byte", workers=workers, chunk_bytes=100)
    assert f"{path}:51: not JSON" in str(caught.value)
    assert names(tmp_path / "o") == []


def test_every_bad_line_of_a_chunk_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n{"text": "b"}\n[]\n')
    with pytest.raises(CorpusError) as caught:
        encode_corpus([path], tmp_path / "x", "byte")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2: not JSON") and second == f"{path}:4: a JSON list, not an object"


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_can_be_left_out(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n\n{"text": "\xff"}\n{"text": ""}\n{"text": "b"}')
    stats = encode_corpus([path], tmp_path / "x", "byte", on_error="skip", workers=workers, chunk_bytes=10)
    counts = stats.keys["text"]
    assert (stats.read, counts.written, counts.empty, stats.rejected) == (5, 2, 1, 2)
    assert [s.tolist() for s in IndexedDataset(tmp_path / "x_text_document")] == [[97], [98]]
    assert f"{path}:2: not JSON" in caplog.text and f"{path}:4: not UTF-8" in caplog.text


def test_several_keys_are_several_pairs(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ab", "title": ""}\n{"text": "c", "title": "T"}\n')
    stats = encode_corpus([path], tmp_path / "x", EncodeSettings("byte", ("text", "title")))
    assert [s.tolist() for s in IndexedDataset(tmp_path / "x_text_document")] == [[97, 98], [99]]
    title = IndexedDataset(tmp_path / "x_title_document")
    assert [s.tolist() for s in title] == [[84]] and title.num_documents == 2
    assert tuple(stats.keys["title"]) == (1, 1, 1)


def test_the_old_pair_survives_bad_input(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good"])
    encode_corpus([path], tmp_path / "x", "byte")
    before = read(tmp_path / "x_text_document")
    path.write_text("bad")
    with pytest.raises(CorpusError):
        encode_corpus([path], tmp_path / "x", "byte")
    assert read(tmp_path / "x_text_document") == before


def test_settings_that_cannot_be_met_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good"])
    with pytest.raises(TokenizerError):
        encode_corpus([path], tmp_path / "x", "bite")
    with pytest.raises(CorpusError, match="twice: text text"):
        encode_corpus([path], tmp_path / "x", EncodeSettings("byte", ("text", "text")))
    with pytest.raises(CorpusError, match="absent"):
        encode_corpus([path, tmp_path / "absent"], tmp_path / "x", "byte")
    assert names(tmp_path) == ["x.jsonl"]


def test_no_eod_to_append_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    path = write_lines(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(CorpusError, match="no end-of-document token"):
        encode_corpus([path], tmp_path / "x", EncodeSettings(f"hf:{tmp_path}/t.json", append_eod=True))


def test_a_large_vocabulary_is_written_in_four_bytes(tmp_path: Path) -> None:
    CharTokenizer([chr(0x4E00 + i) for i in range(20_000)] + [chr(0x20000 + i) for i in range(46_000)]).save(
        tmp_path / "t.json"
    )
    encode_corpus([write_lines(tmp_path / "x.jsonl", ["一丁"])], tmp_path / "x", f"char:{tmp_path}/t.json")
    dataset = IndexedDataset(tmp_path / "x_text_document")
    assert dataset.dtype == np.int32 and dataset[0].tolist() == [0, 1]


def test_the_first_documents_can_be_taken_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["aa", "", "b", "cc", "dd"] * 20)
    for wanted in (1, 2, 7, 1000):
        stats = encode_corpus([path], tmp_path / "x", "byte", max_documents=wanted, chunk_bytes=70)
        expected = (["aa", "", "b", "cc", "dd"] * 20)[:wanted]
        dataset = IndexedDataset(tmp_path / "x_text_document")
        assert [bytes(s.tolist()).decode() for s in dataset] == [text for text in expected if text]
        assert stats.read == dataset.num_documents == len(expected)


@pytest.mark.parametrize("chunk_bytes", [30, 1 << 20])
def test_bad_lines_after_the_last_document_taken_do_not_count(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "x.jsonl"
    good = '{"text": "a", "title": "t"}\n'
    path.write_text(good + "\n" + good * 2 + '{"text": "no title"}\n' + good + "bad\n" * 3)
    settings = EncodeSettings("byte", ("text", "title"))
    options: dict[str, Any] = {"chunk_bytes": chunk_bytes}
    assert encode_corpus([path], tmp_path / "o", settings, max_documents=3, **options).rejected == 0
    for wanted, rejected in ((3, 0), (4, 1), (5, 4)):
        stats = encode_corpus(
            [path], tmp_path / "o", settings, max_documents=wanted, on_error="skip", **options
        )
        assert (stats.rejected, stats.read - stats.rejected) == (rejected, min(wanted, 4))
    with pytest.raises(CorpusError, match=r'x\.jsonl:5: no key "title"'):
        encode_corpus([path], tmp_path / "o", settings, max_documents=4, **options)


def test_of_many_bad_lines_the_first_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("bad\n" * 300)
    with pytest.raises(CorpusError) as caught:
        encode_corpus([path], tmp_path / "o", "byte")
    lines = str(caught.value).splitlines()
    assert (
        len(lines) == 11 and lines[-1] == "... and 290 more" and lines[9].startswith(f"{path}:10: not JSON")
    )


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("x.jsonl/o", "--output-prefix .*x.jsonl/o_text_document.bin: cannot be written: "),
        ("o/", "--output-prefix: '.*/o/' names no file"),
    ],
)
def test_a_prefix_that_cannot_be_written_is_named(tmp_path: Path, prefix: str, reason: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good"])
    with pytest.raises(CorpusError, match=reason):
        encode_corpus([path], f"{tmp_path}/{prefix}", "byte")
    with pytest.raises(CorpusError, match="'' names no file"):
        encode_corpus([path], "", "byte")
    assert names(tmp_path) == ["x.jsonl"]


def test_a_sidecar_says_how_it_was_made(tmp_path: Path) -> None:
    settings = EncodeSettings("byte", append_eod=True)
    encode_corpus([write_lines(tmp_path / "x.jsonl", TEXTS)], tmp_path / "x", settings)
    sidecar = read_sidecar(tmp_path / "x_text_document")
    assert sidecar is not None and sidecar.checksums == Checksums.of_files(tmp_path / "x_text_document")
    assert (sidecar.tokenizer, sidecar.vocab_size, sidecar.eod_id, sidecar.append_eod) == (
        "byte",
        257,
        256,
        True,
    )
    assert (sidecar.documents, sidecar.sequences, sidecar.special_tokens) == (5, 4, "plain")
    assert sidecar.fingerprint == load_tokenizer("byte").fingerprint()


def test_a_json_file_of_the_users_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x_text_document.json").write_text('{"text": "mine"}')
    with pytest.raises(DatasetError, match="would be written over"):
        encode_corpus([tmp_path / "x_text_document.json"], tmp_path / "x", "byte")
    assert names(tmp_path) == ["x_text_document.json"]


@pytest.mark.parametrize("append_eod", [False, True])
def test_sentences_are_sequences_as_megatron_writes_them(
    tmp_path: Path, append_eod: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a splitter of our own, NLTK being no dependency."""
    monkeypatch.setattr(
        chunk_encoder, "sentence_splitter", lambda language, newlines: lambda text: text.split("|")
    )
    texts = ["a|bc||d", "", "|", "e", "f|"]
    path = write_lines(tmp_path / "x.jsonl", texts)
    settings = EncodeSettings("byte", append_eod=append_eod, language="english")
    stats = encode_corpus([path], tmp_path / "x", settings)
    dataset = IndexedDataset(tmp_path / "x_text_sentence")
    eod = [256] if append_eod else []
    assert [s.tolist() for s in dataset] == [[97], [98, 99], [100, *eod], [101, *eod], [102, *eod]]
    assert dataset.document_bounds.tolist() == [0, 3, 3, 3, 4, 5]
    assert stats.keys["text"][:2] == (3, 2)


def test_sentences_without_nltk_are_a_reasoned_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    path = write_lines(tmp_path / "x.jsonl", TEXTS)
    with pytest.raises(CorpusError, match="pip install nltk"):
        encode_corpus([path], tmp_path / "x", EncodeSettings("byte", language="english"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("gigatoken")
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["the cat sat on the mat, it's 1234 and  12 東京"] * 3, 300, path)
    return f"hf:{path}"


@pytest.mark.parametrize("append_eod", [False, True])
def test_gigatoken_and_the_library_write_the_same_files(tmp_path: Path, bpe: str, append_eod: bool) -> None:
    texts = [*TEXTS, *(f"the cat {number} 東京 " * (number % 13) for number in range(200))]
    path = write_lines(tmp_path / "x.jsonl", texts)
    found = set()
    for encoder, workers in (
        ("gigatoken", 1),
        ("gigatoken", 3),
        ("auto", 2),
        ("reference", 1),
        ("reference", 2),
    ):
        settings = EncodeSettings(bpe, append_eod=append_eod, encoder=encoder, verify=7)  # type: ignore[arg-type]
        encode_corpus([path], tmp_path / "x", settings, workers=workers, chunk_bytes=999)
        found.add((*read(tmp_path / "x_text_document"), (tmp_path / "x_text_document.json").read_bytes()))
    assert len(found) == 1


@pytest.mark.parametrize("text", ["the mat", "the mat " * 10_000])
def test_other_ids_than_the_librarys_end_the_run(
    tmp_path: Path, bpe: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a", "b", "c", text])
    encode = HuggingFaceTokenizer.encode
    monkeypatch.setattr(
        HuggingFaceTokenizer,
        "encode",
        lambda self, own: [0, *encode(self, own)] if own.startswith("the mat") else encode(self, own),
    )
    encode_corpus([path], tmp_path / "unseen", EncodeSettings(bpe, verify=3), workers=2)
    encode_corpus([path], tmp_path / "unseen", EncodeSettings(bpe, verify=0), workers=2)
    with pytest.raises(ValueError, match="gives other ids than hf:"):
        encode_corpus([path], tmp_path / "x", EncodeSettings(bpe, verify=2), workers=2)
    assert not list(tmp_path.glob("x_*"))


def test_special_tokens_are_letters_unless_they_are_parsed(tmp_path: Path, bpe: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a<|endoftext|>b"])
    for kind in ("plain", "parse"):
        encode_corpus([path], tmp_path / kind, EncodeSettings(bpe, special_tokens=kind))  # type: ignore[arg-type]
        sidecar, ids = (
            read_sidecar(tmp_path / f"{kind}_text_document"),
            IndexedDataset(tmp_path / f"{kind}_text_document")[0],
        )
        assert sidecar is not None and sidecar.special_tokens == kind
        assert (sidecar.eod_id in ids.tolist()) == (kind == "parse")


def test_progress_is_logged_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    path = write_lines(tmp_path / "x.jsonl", ["text " * 20] * 100)
    encode_corpus([path], tmp_path / "x", "byte", chunk_bytes=500, progress=Progress(log_interval=30))
    lines = [line for line in caplog.messages if "tokens/s" in line]
    assert len(lines) == 3 and lines[0].startswith("3") and "MB/s" in lines[0] and "s left" in lines[0]
    encode_corpus([path], tmp_path / "x", "byte", chunk_bytes=500, progress=Progress(bar=True))
    assert "MB/s" in capsys.readouterr().err
