"""tools/inspect_checkpoint.py."""

import torch

from megatron_lite.checkpoint import Piece, save
from tools.inspect_checkpoint import main


def test_it_shows_what_there_is(tmp_path, capsys):
    weight = torch.full((3, 4), 2.0)
    pieces = [
        Piece.whole("embed.weight", "weight", weight),
        Piece.whole("embed.weight", "exp_avg", weight * 0),
    ]
    path = save(tmp_path / "checkpoints", 7, pieces, {"consumed_samples": 70, "config": {"model": {}}})
    assert main([str(tmp_path), "--verify", "--norms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "verified: every checksum of 1 files is right",
        f"{path}: step 7, 1 files, holds weight, exp_avg",
        "consumed_samples 70",
        "embed.weight  float32   [3, 4]                |weight| 6.9282  |exp_avg| 0",
        "parameters 12 in 1 tensors",
    ]
    assert main([str(path)]) == 0
    assert "|weight|" not in capsys.readouterr().out


def test_damage_is_an_error(tmp_path, capsys):
    path = save(tmp_path, 1, [Piece.whole("norm.weight", "weight", torch.ones(4))], {})
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    assert main([str(path)]) == 0, "a look at the sizes does not show it"
    assert main([str(path), "--verify"]) == 2
    assert "weight/norm.weight/0:4/0 does not match its checksum" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
