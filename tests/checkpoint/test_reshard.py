"""Checkpoints cut anew: the same bits in other files, and memory that does not grow with them."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import KINDS, CheckpointError, Piece, Reader, find_latest, resolve, save, store
from megatron_lite.checkpoint import reshard as module
from megatron_lite.checkpoint.merge import merge
from megatron_lite.checkpoint.reshard import count_files, reshard
from megatron_lite.config import ModelConfig
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.parameter import spec_of

MODELS = {
    "gpt2": {"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True},
    "llama": {
        "position_embedding": "rope",
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "ffn_hidden_size": 24,
        "add_bias_linear": False,
        "num_query_groups": 2,
        "tie_embeddings": False,
    },
}


def save_model(folder, style="gpt2", step=12):
    """A checkpoint with optimizer state of a small model, its vocabulary odd."""
    section = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "seq_length": 8,
        "vocab_size": 77,
    }
    model = ModelConfig(**section, make_vocab_size_divisible_by=4, **MODELS[style])
    torch.manual_seed(0)
    gpt = GPT(model, Runtime(device=torch.device("meta")))
    specs = [spec_of(parameter) for parameter in gpt.parameters()]
    pieces = [
        Piece.whole(spec.name, kind, torch.randn(spec.global_shape)) for spec in specs for kind in KINDS
    ]
    progress = {"step": step, "consumed_samples": 10 * step, "consumed_tokens": 80 * step, "data": {"a": 3}}
    metadata = {"config": {"model": model.model_dump(mode="json")}, "progress": progress}
    return save(folder / "checkpoints", step, pieces, metadata)


def read_all(path, kinds=KINDS):
    with Reader(path) as reader:
        reader.verify()
        assert reader.kinds == list(kinds)
        return {(kind, name): reader.read(name, kind) for kind in kinds for name in reader.names(kind)}


@pytest.mark.parametrize("style", MODELS)
def test_there_and_back_is_the_same_bits(tmp_path, style, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 500)  # less than most parameters have
    source = save_model(tmp_path / "source", style)
    before = read_all(source)
    for number, (tensor, pipeline, data) in enumerate(itertools.product((1, 4), (1, 3), (1, 5))):
        target = tmp_path / str(number)
        step = reshard(source, target, tensor=tensor, pipeline=pipeline, data=data)
        assert step == resolve(target) == find_latest(target, checksums=True)
        after = read_all(step)
        assert after.keys() == before.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        with Reader(source) as old, Reader(step) as new:
            assert len(new.files) == tensor * pipeline * data and new.step == 12
            assert new.metadata["progress"] == old.metadata["progress"]
            assert new.metadata["layout"] == {
                "tensor": tensor,
                "pipeline": pipeline,
                "data": data,
                "written_by": "tools/convert_checkpoint.py",
            }
        source = step  # and from there to the next


def test_a_layout_is_what_its_ranks_hold(tmp_path):
    """A stage's file has that stage's layers, a tensor rank's its slice, and so a rank reads its own file alone."""
    step = reshard(save_model(tmp_path / "source", "llama"), tmp_path / "target", tensor=2, pipeline=3)
    with Reader(step) as reader:
        held = [set(entry.pieces.values()) for entry in reader._files.values()]
    names = [sorted({piece.name.split(".")[0] for piece in pieces}) for pieces in held]
    assert names == [["blocks", "embed"]] * 2 + [["blocks"]] * 2 + [
        ["blocks", "head", "norm"],
        ["blocks", "head"],
    ]
    rows = {(piece.span.start, piece.span.stop) for piece in held[1] if piece.name == "embed.weight"}
    assert rows == {(40, 80)}


def test_equal_files(tmp_path):
    source = save_model(tmp_path / "source")
    step = reshard(source, tmp_path / "target", data=7)
    sizes = [file.stat().st_size for file in sorted(step.glob("*.safetensors"))]
    assert len(sizes) == 7
    wanted = count_files(source, 20_000)
    step = reshard(source, tmp_path / "small", data=wanted)
    largest = max(file.stat().st_size for file in step.glob("*.safetensors"))
    assert 15_000 < largest < 20_000 + 4_000, "headers come on top"
    assert count_files(source, 10**9) == 1
    assert count_files(source, 20_000, weights_only=True, dtype=torch.bfloat16) == -(-wanted // 6)


def test_weights_only_in_bf16(tmp_path):
    source = save_model(tmp_path / "source")
    step = reshard(source, tmp_path / "target", tensor=2, weights_only=True, dtype=torch.bfloat16)
    before, after = read_all(source), read_all(step, ["weight"])
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in after)
    with pytest.raises(CheckpointError, match="bfloat16 rounds the fp32 weights that training goes on from"):
        reshard(source, tmp_path / "other", dtype=torch.bfloat16)


def test_what_cannot_be_done_is_said_first(tmp_path, monkeypatch):
    source = save_model(tmp_path / "source")
    with pytest.raises(ValueError, match="does not divide over 3 tensor-parallel ranks"):
        reshard(source, tmp_path / "target", tensor=3)
    with pytest.raises(ValueError, match="3 transformer blocks cannot fill 4 pipeline stages"):
        reshard(source, tmp_path / "target", pipeline=4)
    with pytest.raises(CheckpointError, match="holds checkpoints already; give another folder"):
        reshard(source, tmp_path / "source")
    bare = save(tmp_path / "bare", 1, [Piece.whole("a", "weight", torch.ones(5))], {})
    with pytest.raises(CheckpointError, match=r"holds no config.model"):
        reshard(bare, tmp_path / "target", tensor=2)
    assert reshard(bare, tmp_path / "bare2", data=2).is_dir(), "files can be cut without knowing the model"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"GB are to be written, and 0\.0 GB are free"):
        reshard(source, tmp_path / "full")
    assert not (tmp_path / "full" / "checkpoints").exists()


def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    source = save_model(tmp_path / "source")
    write, calls = store.write_safetensors, []

    def fail(path, *rest):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    monkeypatch.setattr(store, "write_safetensors", fail)
    with pytest.raises(OSError, match="No space left"):
        reshard(source, tmp_path / "target", data=3)
    assert not (tmp_path / "target" / "checkpoints").exists()


MEASURE = """
import sys
from pathlib import Path
from megatron_lite.checkpoint import resolve
from megatron_lite.checkpoint import diff, reshard as module
from megatron_lite.checkpoint.merge import merge
module.PIECE = diff.BLOCK = 1 << 18


def peak():
    # Not resource.getrusage, whose peak starts at that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


for folder in ("small", "large"):
    path = Path(sys.argv[1]) / folder
    module.reshard(resolve(path), path / "resharded", data=3)
    merge(resolve(path), path / "merged")
    assert not any(found.differs for found in diff.differences(*diff.open_two(path, path / "resharded")))
    print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Three times as many parameters, each of 4 MiB, 288 MiB in all: the peak stays where it was.

    Of cutting anew, merging, and comparing.
    """
    for folder, count in (("small", 8), ("large", 24)):
        pieces = [Piece.whole(f"p{i}", kind, torch.ones(1 << 20)) for i in range(count) for kind in KINDS]
        save(tmp_path / folder, 1, pieces, {})
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back: no luck in the peak
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    small, large = (int(line) for line in run.stdout.split())
    assert large - small < 24 * 1024, f"the peak grew from {small} KiB to {large} KiB"


def test_merged(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    before = {name: value for (kind, name), value in read_all(source).items() if kind == "weight"}
    assert merge(source, tmp_path / "one") == ["model.safetensors"]
    found = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in found)
    assert json.loads((tmp_path / "one" / "model_config.json").read_text())["activation"] == "swiglu"

    files = merge(source, tmp_path / "many", dtype=torch.bfloat16, file_bytes=4000)
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(before)
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in before.values())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "many" / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), before[name].bfloat16())
    with pytest.raises(CheckpointError, match="holds safetensors files already"):
        merge(source, tmp_path / "many")
