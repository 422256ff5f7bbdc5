"""tools/inspect_data.py: what it says beside the contract that test_preprocess_data.py checks."""

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_lite.data import IndexedDataset, IndexedDatasetWriter, write_sidecar
from megatron_lite.data.sidecar import Checksums, Sidecar
from megatron_lite.tokenizers import ByteTokenizer, CharTokenizer
from tools.inspect_data import main

TEXTS = ["Hello, world", "", "ünï 🙂\nsecond line", "x" * 100]


def write(prefix: Path, tokenizer: str | None = "byte") -> str:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for text in TEXTS:
            writer.add_document([*text.encode(), 256] if text else [])
    if tokenizer is not None:
        dataset = IndexedDataset(prefix)
        counts = (dataset.num_documents, len(dataset), dataset.num_tokens)
        fingerprint, sums = ByteTokenizer().fingerprint(), Checksums.of_files(prefix)
        write_sidecar(
            prefix, Sidecar(tokenizer, fingerprint, 257, 256, True, "plain", "uint16", *counts, sums)
        )
    return str(prefix)


def test_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x")
    assert main([prefix, "--full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "documents 4, sequences 3, tokens 137" and lines[2] == "dtype uint16"
    assert lines[3] == "tokenizer byte, vocabulary 257, eod 256 appended to every document"
    assert lines[4].startswith("checksums verified: .bin ")
    assert lines[5] == "tokens per sequence: 13 to 101, mean 45.7"
    assert lines[6] == (
        "tokens per document, percentiles: 1 %: 0, 5 %: 0, 25 %: 0, 50 %: 13, 75 %: 23, 95 %: 101, 99 %: 101"
    )
    assert lines[7].split() == ["0", "1", "█" * 40] and lines[-3].split()[:4] == ["64", "to", "127", "1"]
    assert lines[-2] == "ids: 10 to 256, all in the vocabulary of 257"
    assert lines[-1].startswith("most frequent ids: 120 72.99%, 108 ")
    assert main([prefix, "--quick"]) == 0
    assert "ids" not in capsys.readouterr().out


def test_documents_and_samples_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x")
    assert main([prefix, "--documents", "2,1,0"]) == 0
    shown = capsys.readouterr().out.partition("--- document 2")[2]
    assert shown == (
        ": 23 tokens in 1 sequences\nünï 🙂\nsecond line<|endoftext|>\n--- document 1: 0 tokens in 0 sequences\n\n"
        "--- document 0: 13 tokens in 1 sequences\nHello, world<|endoftext|>\n"
    )
    arguments = [
        "--seq-length",
        "12",
        "--split",
        "1,0,0",
        "--show",
        "2",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    for tokenizer in ([], ["--tokenizer", "byte"]):
        assert main([prefix, *arguments, *tokenizer]) == 0
        shown = capsys.readouterr().out
        assert 'most frequent ids: 120 "x" 72.99%' in shown
        *_, first, _, second = shown.partition("training samples: ")[2].splitlines()
        assert first.strip().startswith('"') and second.strip().startswith('"')
    assert main([write(tmp_path / "y", "hf:gone.json"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "samples are shown as ids alone: " in shown and shown.splitlines()[-1].endswith("…")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--documents", "4"], "no document 4 among 4"),
        (["--documents", "-1"], "no document -1"),
        (["--documents", "a"], "not numbers with commas"),
        (["--tokenizer", "char:CHARS"], "made with another tokenizer"),
        (["--tokenizer", "bite"], "unknown tokenizer"),
    ],
)
def test_bad_settings_are_one_message(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CharTokenizer(["a"]).save(tmp_path / "chars.json")
    prefix = write(tmp_path / "x")
    arguments = [argument.replace("CHARS", str(tmp_path / "chars.json")) for argument in arguments]
    # Negative numbers look like options unless they are bound to theirs.
    assert main([prefix, "=".join(arguments)]) == 2
    assert reason in capsys.readouterr().err


def test_without_a_tokenizer_documents_need_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path / "x", None)]) == 0
    assert "no PREFIX.json beside it" in capsys.readouterr().out
    assert main([write(tmp_path / "y", None), "--documents", "0"]) == 2
    assert "give it as --tokenizer SPEC" in capsys.readouterr().err
    assert main([write(tmp_path / "z", "hf:gone.json"), "--documents", "0"]) == 2
    assert "gone.json" in (error := capsys.readouterr().err) and "say where it is with --tokenizer" in error


def test_damage_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x")
    path = Path(f"{prefix}.bin")
    data = path.read_bytes()
    path.write_bytes(b"\x01\x01" + data[2:])
    assert main([prefix, "--quick"]) == 0
    assert main([prefix, "--full"]) == 2 and "its checksum is" in capsys.readouterr().err
    assert (
        main([prefix]) == 2
        and "ids from 10 to 257, where a vocabulary has 0 to 256" in capsys.readouterr().err
    )


def test_a_picture_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, picture = write(tmp_path / "x"), tmp_path / "x.png"
    if importlib.util.find_spec("matplotlib"):
        assert main([prefix, "--histogram", str(picture)]) == 0
        assert picture.read_bytes()[1:4] == b"PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([prefix, "--histogram", str(picture)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
