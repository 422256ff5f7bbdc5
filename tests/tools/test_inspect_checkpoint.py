"""tools/inspect_checkpoint.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import Piece, resolve, save
from tests.checkpoint.test_reshard import save_model
from tools.convert_checkpoint import main as convert
from tools.inspect_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
TAKEN = [8, "none", 11]
PROGRESS = {
    "step": 7,
    "consumed_samples": 70,
    "consumed_tokens": 5600,
    "data": {
        "first": 40,
        "sources": [
            {"prefix": "data/a", "weight": 0.75, "given": 21, "history": [TAKEN]},
            {"prefix": "data/b", "weight": 0.25, "given": 1, "history": []},
        ],
    },
}


def save_small(folder, step=7, change=None, kinds=("weight", "exp_avg"), **more):
    """Parameters with names as in a model, of two blocks that are alike."""
    tensors = {
        "embed.weight": torch.full((3, 4), 2.0),
        "blocks.0.norm.weight": torch.ones(4),
        "blocks.1.norm.weight": torch.ones(4),
        "norm.weight": torch.zeros(4),
    } | more
    pieces = [
        Piece.whole(name, kind, tensor * (kind == "weight"))
        for name, tensor in tensors.items()
        for kind in kinds
    ]
    metadata = {
        "progress": PROGRESS,
        "layout": {"tensor": 2, "zero_stage": 1},
        "config": {"model": {}},
        "extra": [1],
    }
    return save(folder / "checkpoints", step, pieces, metadata)


def test_it_shows_what_there_is(tmp_path, capsys):
    path = save_small(tmp_path)
    size = (path / "rank_00000.safetensors").stat().st_size
    assert main([str(tmp_path), "--verify", "--norms"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "verified: every checksum of 1 file is right",
        f"{path}: step 7, 1 file, {size:,} bytes, holds weight, exp_avg",
        "position: step 7, 70 samples, 5,600 tokens",
        "  data/a: weight 0.75, 21 samples given, 11 before sample 40",
        "  data/b: weight 0.25, 1 sample given",
        "written by: tensor 2, zero_stage 1",
        "extra [1]",
        f"rank_00000.safetensors  {size:,} bytes",
        "embed.weight          float32   [3, 4]                |weight| 6.9282  |exp_avg| 0",
        "norm.weight           float32   [4]                   |weight| 0  |exp_avg| 0",
        "blocks.0 … blocks.1 (2 alike)",
        "  norm.weight         float32   [4]                   |weight| 2  |exp_avg| 0",
        "parameters 24 in 4 tensors",
    ]
    assert main([str(path)]) == 0
    assert "|weight|" not in capsys.readouterr().out


def test_blocks_are_in_order_and_those_that_differ_apart(tmp_path, capsys):
    blocks = {f"blocks.{layer}.norm.weight": torch.ones(4) for layer in range(12)}
    save_small(tmp_path, **blocks | {"blocks.3.norm.bias": torch.ones(4)})
    assert main([str(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks")]
    assert said == ["blocks.0 … blocks.2 (3 alike)", "blocks.3", "blocks.4 … blocks.11 (8 alike)"]


def test_json(tmp_path, capsys):
    path = save_small(tmp_path, **{"norm.weight": torch.tensor([float("nan")])})
    assert main([str(tmp_path), "--json", "--norms", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path) and found["step"] == 7 and found["verified"] is True
    assert found["files"] == {"rank_00000.safetensors": (path / "rank_00000.safetensors").stat().st_size}
    assert found["metadata"]["progress"] == PROGRESS
    assert found["parameters"][2] == {
        "name": "embed.weight",
        "shape": [3, 4],
        "dtypes": {"weight": "float32", "exp_avg": "float32"},
        "norms": {"weight": 48**0.5, "exp_avg": 0.0},
    }
    assert found["parameters"][3]["norms"]["weight"] == "nan", "which JSON has no number for"


def test_damage_is_an_error(tmp_path, capsys):
    path = save(tmp_path, 1, [Piece.whole("norm.weight", "weight", torch.ones(4))], {})
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    assert main([str(path)]) == 0, "a look at the sizes does not show it"
    assert main([str(path), "--verify"]) == 2
    assert "weight/norm.weight/0:4/0 does not match its checksum" in capsys.readouterr().err
    assert main([str(path), "--diff", str(path), "--verify"]) == 2
    assert main([str(tmp_path / "none")]) == 2


def test_a_run_whose_newest_step_is_damaged_is_not_verified(tmp_path, capsys):
    older, newest = (save_small(tmp_path, step) for step in (7, 8))
    assert main([str(tmp_path), "--verify"]) == 0
    file = newest / "rank_00000.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0 and "step 7" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "checkpoints"):
        assert main([str(folder), "--verify", "--json"]) == 2
        out, err = capsys.readouterr()
        assert not out and f"{newest} is damaged" in err and f"{older}, the next to resume from" in err
    assert main([str(older), "--verify"]) == 0


def test_a_reader_that_has_seen_enough(tmp_path):
    """As `inspect_checkpoint.py … | head -1`, of more than a pipe takes."""
    pieces = [Piece.whole(f"p{at}.weight", "weight", torch.ones(2)) for at in range(3000)]
    step = save(tmp_path, 1, pieces, {})
    other = save(tmp_path, 2, [Piece.whole(piece.name, "weight", -piece.data) for piece in pieces], {})
    for more in ("", f"--diff {other}"):
        command = (
            f"{sys.executable} -m tools.inspect_checkpoint {step} {more} | head -1; exit ${{PIPESTATUS[0]}}"
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (141, ""), (
            "which is not that of a diff in which nothing differs"
        )
        assert len(done.stdout.splitlines()) == 1


def test_ctrl_c_is_quiet(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    step = save_small(tmp_path)
    monkeypatch.setattr("tools.inspect_checkpoint.describe", interrupt)
    monkeypatch.setattr("tools.convert_checkpoint.merge", interrupt)
    assert main([str(step)]) == 130
    assert convert(["--load", str(step), "--save", str(tmp_path / "out"), "--to", "safetensors"]) == 130
    assert "interrupted: the conversion is not done" in capsys.readouterr().err


def test_equal_checkpoints(tmp_path, capsys):
    first, second = save_small(tmp_path / "a"), save_small(tmp_path / "b", step=9)
    assert main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "every element of 8 tensors is the same",
        f"{tmp_path / 'a'} is at step 7",
        f"{tmp_path / 'b'} is at step 9",
    ]
    nan = {"norm.weight": torch.tensor([float("nan"), 1.0])}
    first, second = save_small(tmp_path / "c", **nan), save_small(tmp_path / "d", kinds=["weight"], **nan)
    assert main([str(first), "--diff", str(second)]) == 0, "moments of one side only are not compared"


def test_what_differs_is_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_lite.checkpoint.diff.BLOCK", 5)
    embed = torch.full((3, 4), 2.0)
    embed[0, 0] = 4.0
    save_small(tmp_path / "a", **{"embed.weight": embed.clone()})
    embed[0, 1], embed[2, 3] = 2.5, 1.75  # the larger difference in an earlier block
    save_small(
        tmp_path / "b",
        **{
            "embed.weight": embed,
            "norm.weight": torch.tensor([0, 0, float("inf"), 0]),
            "blocks.1.norm.weight": torch.ones(5),
            "blocks.2.norm.weight": torch.ones(4),
        },
    )
    assert main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:6] == [
        f"only in {tmp_path / 'b'}: blocks.2.norm.weight",
        "blocks.1.norm.weight: shape [4] and [5]",
        "embed.weight: largest difference 0.5, 1.2e-01 of the largest element, in 2 of 12 elements",
        "norm.weight: largest difference inf, 1.0e+00 of the largest element, in 1 of 4 elements",
        "norm.weight (exp_avg): largest difference inf, 1.0e+00 of the largest element, in 1 of 4 elements",
        "4 of 7 tensors differ, most of all blocks.1.norm.weight",
    ]
    assert main([str(tmp_path / "a"), "--diff", str(tmp_path / "b"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False and found["only"] == [[], ["blocks.2.norm.weight"]]
    assert found["differences"][2] == {
        "name": "embed.weight",
        "kind": "weight",
        "numel": 12,
        "count": 2,
        "absolute": 0.5,
        "relative": 0.125,
        "note": "",
    }


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_hugging_face_folders_are_compared_by_our_names(tmp_path, capsys, style):
    own = save_model(tmp_path / "run", style)
    hf, merged = tmp_path / "hf", tmp_path / "merged"
    assert convert(["--load", str(own), "--save", str(hf), "--to", "hf", "--no-check"]) == 0
    assert convert(["--load", str(own), "--save", str(merged), "--to", "safetensors"]) == 0
    for pair in ((own, hf), (hf, own), (own, merged), (merged, own), (hf, merged)):
        capsys.readouterr()
        assert main([str(pair[0]), "--diff", str(pair[1])]) == 0, pair
        assert "every element of" in capsys.readouterr().out
    assert main([str(hf), "--diff", str(hf)]) == 0, "by the names that are in them"
    assert main([str(merged / "model.safetensors"), "--diff", str(merged)]) == 0

    weights = safetensors.torch.load_file(hf / "model.safetensors")
    name = next(name for name in weights if name.endswith(("mlp.c_fc.weight", "up_proj.weight")))
    weights[name][0, 0] += 1
    safetensors.torch.save_file(weights, hf / "model.safetensors")
    capsys.readouterr()
    assert main([str(own), "--diff", str(hf)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("blocks.0.mlp.linear_fc1.weight: largest difference 1, ") and "in 1 of" in said


def test_plain_files_are_shown_too(tmp_path, capsys):
    safetensors.torch.save_file(
        {"a.0.x": torch.ones(2, 3), "b": torch.ones(1).half()}, tmp_path / "x.safetensors"
    )
    assert main([str(tmp_path / "x.safetensors"), "--norms"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'x.safetensors'}: holds weight",
        "b      float16   [1]                   |weight| 1",
        "a.0",
        "  x    float32   [2, 3]                |weight| 2.44949",
        "parameters 7 in 2 tensors",
    ]
    assert main([str(tmp_path / "x.safetensors"), "--verify"]) == 2
    assert "holds no checksums" in capsys.readouterr().err
    (tmp_path / "y.safetensors").write_bytes(b"nonsense")
    assert main([str(tmp_path / "x.safetensors"), "--diff", str(tmp_path / "y.safetensors")]) == 2
    assert "y.safetensors cannot be read" in capsys.readouterr().err


def test_blocks_of_different_kinds_are_told_apart(tmp_path, capsys):
    """An encoder and a decoder whose blocks look the same, as other systems name them."""
    names = [f"{kind}.{layer}.norm" for kind in ("decoder", "encoder") for layer in range(11)]
    safetensors.torch.save_file({name: torch.ones(2) for name in names}, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "alike" in line]
    assert said == ["decoder.0 … decoder.10 (11 alike)", "encoder.0 … encoder.10 (11 alike)"]


def test_tensors_without_elements(tmp_path, capsys):
    for name, shape in (("a", (0, 4)), ("b", (0, 4)), ("c", (0, 5))):
        tensors = {"empty": torch.ones(shape), "w": torch.ones(2)}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    assert main([str(tmp_path / "a.safetensors"), "--norms"]) == 0
    assert "float32   [0, 4]                |weight| 0\n" in capsys.readouterr().out
    assert main([str(tmp_path / "a.safetensors"), "--diff", str(tmp_path / "b.safetensors")]) == 0
    assert "every element of 2 tensors is the same" in capsys.readouterr().out
    assert main([str(tmp_path / "a.safetensors"), "--diff", str(tmp_path / "c.safetensors")]) == 1
    assert "empty: shape [0, 4] and [0, 5]" in capsys.readouterr().out


@pytest.mark.parametrize("weight_map", ["[]", "{}", '{"a": 1}', '{"a": [2]}', "null"])
def test_an_index_that_is_none(tmp_path, capsys, weight_map):
    own = save_model(tmp_path / "run", "llama")
    hf = tmp_path / "hf"
    assert convert(["--load", str(own), "--save", str(hf), "--to", "hf", "--no-check"]) == 0
    (hf / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    capsys.readouterr()
    for arguments in ([str(hf)], [str(own), "--diff", str(hf)], [str(hf), "--diff", str(hf)]):
        assert main(arguments) == 2
        assert "index.json: weight_map does not say which file holds which" in capsys.readouterr().err
    assert convert(["--load", str(hf), "--save", str(tmp_path / "back"), "--to", "megatron_lite"]) == 2
    assert "index.json: weight_map does not say which file holds which" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["C64", "F4"])
def test_numbers_that_have_no_size_are_not_compared(tmp_path, capsys, dtype):
    file = tmp_path / "x.safetensors"
    size = {"C64": 16, "F4": 1}[dtype]
    header = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    try:
        safetensors.torch.load_file(file)
    except safetensors.SafetensorError:
        pytest.skip(f"this release of safetensors does not know {dtype}")
    assert main([str(file)]) == 0
    capsys.readouterr()
    for arguments in ([str(file), "--norms"], [str(file), "--diff", str(file)]):
        assert main(arguments) == 2
        assert "x.safetensors: w is torch." in capsys.readouterr().err


def test_a_config_that_is_none(tmp_path, capsys):
    own = save_model(tmp_path / "run", "llama")
    hf = tmp_path / "hf"
    assert convert(["--load", str(own), "--save", str(hf), "--to", "hf", "--no-check"]) == 0
    whole = json.loads((hf / "config.json").read_text())
    many = json.dumps(whole | {"num_hidden_layers": 10**5})  # of more there is no list that fits in memory
    for content, says in (
        (json.dumps(whole | {"num_hidden_layers": "x"}), "num_layers: Input should be a valid integer"),
        ("[" * 100_000, "cannot be read"),
        (many, "config.json says 100000 layers, and there are 30 tensors"),
    ):
        (hf / "config.json").write_text(content)
        assert main([str(own), "--diff", str(hf)]) == 2
        assert says in capsys.readouterr().err


def test_steps_of_one_run(tmp_path):
    first, second = save_small(tmp_path, 7), save_small(tmp_path, 9, **{"norm.weight": torch.ones(4)})
    assert resolve(tmp_path) == second
    assert main([str(first), "--diff", str(tmp_path)]) == 1
