"""tools/convert_checkpoint.py, there and back, from the command line's point of view."""

import sys

import pytest
import torch

from megatron_lite.checkpoint import Piece, Reader, resolve, save
from megatron_lite.checkpoint.huggingface import rules
from megatron_lite.config import ModelConfig
from tools.convert_checkpoint import main


@pytest.fixture
def run(tmp_path):
    """The output directory of a run of a small model, at step 3."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=32,
        vocab_size=77,
        add_bias_linear=True,
    )
    torch.manual_seed(0)
    pieces = [
        Piece.whole(rule.name, kind, torch.randn(rule.shape) * 0.1)
        for rule in rules(model)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]
    save(tmp_path / "run" / "checkpoints", 3, pieces, {"config": {"model": model.model_dump(mode="json")}})
    return tmp_path / "run"


def convert(load, to, target, *flags):
    return main(["--load", str(load), "--save", str(target), "--to", to, *flags])


def test_there_and_back(run, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert convert(run, "hf", tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert "77 of 128 vocabulary rows" in said and "checked: transformers' logits differ from ours by" in said
    assert convert(tmp_path / "hf", "megatron_lite", tmp_path / "back") == 0
    with Reader(resolve(run)) as before, Reader(resolve(tmp_path / "back")) as after:
        assert after.step == 0 and after.kinds == ["weight"] and after.names() == before.names()
        for name in before.names():
            rows = 77 if name == "embed.weight" else None
            assert torch.equal(before.read(name)[:rows], after.read(name)[:rows])


def test_without_transformers_or_unasked_it_says_that_nothing_was_checked(run, tmp_path, capsys, monkeypatch):
    assert convert(run, "hf", tmp_path / "unasked", "--no-check") == 0
    assert "checked" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert(run, "hf", tmp_path / "hf") == 0
    assert "not checked: transformers is not installed" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    file = resolve(run) / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert convert(run, "hf", tmp_path / "hf") == 2
    assert "rank_00000.safetensors is damaged: exp_avg_sq/" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("to", ["hf", "megatron_lite"])
def test_nothing_there(tmp_path, capsys, to):
    assert convert(tmp_path / "none", to, tmp_path / "out") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
