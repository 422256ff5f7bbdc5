"""examples/shakespeare_char.py: what configs/shakespeare_char.json reads."""

import re
from pathlib import Path

import numpy as np
import pytest

from examples.shakespeare_char import main
from megatron_lite.config import load_config
from megatron_lite.data import IndexedDataset, read_sidecar
from megatron_lite.tokenizers import load_tokenizer
from tests.command_line import ROOT

TEXT = "To be, or not to be: that is the question.\n" * 30
CONFIG = ROOT / "configs/shakespeare_char.json"


def test_nine_tenths_of_the_characters_are_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT)
    assert main(["--text", "input.txt"]) == 0
    config = load_config(CONFIG, check_files=True)  # finds all it names
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    assert tokenizer.vocab_size == len(set(TEXT)) + 2
    assert config.with_vocab_size(tokenizer.vocab_size).model.padded_vocab_size == tokenizer.vocab_size
    parts = []
    for prefix in (config.data.train, config.data.valid):
        assert isinstance(prefix, str)
        dataset = IndexedDataset(prefix)
        assert len(dataset) == 1
        sidecar = read_sidecar(prefix)
        assert sidecar is not None and sidecar.fingerprint == tokenizer.fingerprint()
        parts.append(tokenizer.decode(np.asarray(dataset[0]).tolist()))
    assert parts == [TEXT[: len(TEXT) * 9 // 10], TEXT[len(TEXT) * 9 // 10 :]]
    assert "python pretrain_gpt.py --config configs/shakespeare_char.json\n" in capsys.readouterr().out


def test_the_command_for_another_folder_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    assert main(["--text", f"{tmp_path}/input.txt", "--output", f"{tmp_path}/other"]) == 0
    command = capsys.readouterr().out.partition("Train it with:")[2].replace("\\\n", " ")
    settings = re.findall(r"--set (\S+)", command)
    config = load_config(CONFIG, settings, check_files=True)
    assert config.train.output_dir == f"{tmp_path}/other"


def test_bad_text_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name in ("empty", "latin", "missing"):
        assert main(["--text", f"{tmp_path}/{name}", "--output", f"{tmp_path}/run"]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "run").exists()
