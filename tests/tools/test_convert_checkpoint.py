"""tools/convert_checkpoint.py, there and back, from the command line's point of view."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import Piece, Reader, resolve, save
from megatron_lite.checkpoint.foreign.arguments import model_of
from megatron_lite.checkpoint.huggingface import rules
from megatron_lite.config import ModelConfig, load_config
from tests.checkpoint.torch_dist import PLAIN, plain, write_torch_dist
from tools.convert_checkpoint import held, main


@pytest.fixture
def run(tmp_path):
    """The output directory of a run of a small model, at step 3."""
    return write_run(tmp_path / "run", add_bias_linear=True)


def write_run(folder, **settings):
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32, vocab_size=77, **settings
    )
    torch.manual_seed(0)
    pieces = [
        Piece.whole(rule.name, kind, torch.randn(rule.shape) * 0.1)
        for rule in rules(model)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]
    save(folder / "checkpoints", 3, pieces, {"config": {"model": model.model_dump(mode="json")}})
    return folder


def convert(load, to, target, *flags):
    return main(["--load", str(load), "--save", str(target), "--to", to, *flags])


def test_there_and_back(run, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert convert(run, "hf", tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert "77 of 128 vocabulary rows" in said and "checked: transformers' logits differ from ours by" in said
    assert convert(tmp_path / "hf", "megatron_lite", tmp_path / "back") == 0
    begin = "--set data.train=PREFIX --set data.tokenizer=SPEC --set train.steps=N"
    said = capsys.readouterr().out
    assert said.endswith(f"start a run from it with --config {tmp_path / 'back' / 'config.json'} {begin}\n")
    load_config(tmp_path / "back" / "config.json", ["data.train=x", "train.steps=3"])
    with Reader(resolve(run)) as before, Reader(resolve(tmp_path / "back")) as after:
        assert after.step == 0 and after.kinds == ["weight"] and after.names() == before.names()
        for name in before.names():
            rows = 77 if name == "embed.weight" else None
            assert torch.equal(before.read(name)[:rows], after.read(name)[:rows])


def test_the_family_among_those_that_fit(run, tmp_path, capsys):
    llama = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu"}
    source = write_run(tmp_path / "llama", add_bias_linear=False, **llama)
    for number, (given, made) in enumerate({"": "Llama", "llama": "Llama", "mistral": "Mistral"}.items()):
        target = tmp_path / str(number)
        assert convert(source, "hf", target, *(["--family", given] if given else [])) == 0
        assert f"{made}ForCausalLM in float32" in capsys.readouterr().out
        assert json.loads((target / "config.json").read_text())["model_type"] == made.lower()
    # What was imported as a Mistral is one again, unless the other is asked for.
    assert convert(target, "megatron_lite", tmp_path / "back") == 0
    assert convert(tmp_path / "back", "hf", tmp_path / "again") == 0
    assert convert(tmp_path / "back", "hf", tmp_path / "other", "--family", "llama") == 0
    said = capsys.readouterr().out
    assert "again: MistralForCausalLM" in said and "other: LlamaForCausalLM" in said

    assert convert(source, "hf", tmp_path / "wrong", "--family", "qwen3") == 2
    assert "cannot be exported as qwen3, only as llama or mistral" in capsys.readouterr().err
    assert convert(run, "hf", tmp_path / "wrong", "--family", "mistral") == 2
    assert "cannot be exported as mistral, only as gpt2" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_without_transformers_or_unasked_it_says_that_nothing_was_checked(run, tmp_path, capsys, monkeypatch):
    assert convert(run, "hf", tmp_path / "unasked", "--no-check") == 0
    assert "checked" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert(run, "hf", tmp_path / "hf") == 0
    assert "not checked: transformers is not installed" in capsys.readouterr().out


def test_what_is_damaged_is_not_converted(run, tmp_path, capsys):
    """Weights alone are read, and verified, where only they are taken."""
    file = resolve(run) / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert convert(run, "megatron_lite", tmp_path / "all") == 2
    assert "rank_00000.safetensors is damaged: exp_avg_sq/" in capsys.readouterr().err
    assert convert(run, "safetensors", tmp_path / "merged") == 0
    assert "every checksum of its weights right" in capsys.readouterr().out
    assert convert(run, "megatron_lite", tmp_path / "light", "--weights-only") == 0
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte after the header: weights come first
    file.write_bytes(data)
    for to, more in (("hf", []), ("safetensors", []), ("megatron_lite", ["--weights-only"])):
        assert convert(run, to, tmp_path / "out", *more) == 2
        assert "rank_00000.safetensors is damaged: weight/" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "megatron_lite"])
def test_nothing_there(tmp_path, capsys, to):
    assert convert(tmp_path / "none", to, tmp_path / "out") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_cut_for_a_layout_and_back(run, tmp_path, capsys):
    assert (
        convert(run, "megatron_lite", tmp_path / "cut", "--tensor", "2", "--pipeline", "2", "--data", "3")
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("step_00000003: every checksum right")
    assert "12 files, 0.00" in said[1] and said[1].endswith("holds weight, exp_avg, exp_avg_sq")
    assert convert(tmp_path / "cut", "megatron_lite", tmp_path / "back", "--no-check") == 0
    assert ": 1 file, " in capsys.readouterr().out, "less than 5 GB"
    assert convert(run, "megatron_lite", tmp_path / "small", "--shard-gb", "0.0001", "--weights-only") == 0
    with Reader(resolve(run)) as before, Reader(resolve(tmp_path / "back")) as after:
        for kind in before.kinds:
            assert all(torch.equal(before.read(n, kind), after.read(n, kind)) for n in before.names())
    with Reader(resolve(tmp_path / "small")) as small:
        assert small.kinds == ["weight"] and len(small.files) == 2


def test_merged_safetensors(run, tmp_path, capsys):
    assert convert(run, "safetensors", tmp_path / "merged", "--dtype", "bf16") == 0
    assert "weights under their own names in model.safetensors" in capsys.readouterr().out
    found = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    with Reader(resolve(run)) as reader:
        assert sorted(found) == reader.names()
        assert all(torch.equal(found[name], reader.read(name).bfloat16()) for name in found)


def test_import_of_another_system(tmp_path, capsys):
    write_torch_dist(tmp_path / "megatron" / "iter_0000003", plain(), PLAIN)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert convert(tmp_path / "megatron", "megatron_lite", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "step_00000003: 8 parameters, holds weight\n" in said and "21 tokens, 24 rows" in said
    assert "weights only: exp_avg of decoder.final_layernorm.weight (8 of 8 parameters) is not there" in said
    begin = "--set data.train=PREFIX --set data.tokenizer=SPEC --set train.steps=N"
    assert said.endswith(f"start a run from it with --config {tmp_path / 'out' / 'config.json'} {begin}\n")
    assert convert(tmp_path / "out", "hf", tmp_path / "hf", "--no-check") == 0
    assert "none: the run had no data.tokenizer; --tokenizer SPEC names one" in capsys.readouterr().out
    config = load_config(tmp_path / "out" / "config.json", ["data.train=x", "data.tokenizer=byte"])
    assert config.checkpoint.load == str(tmp_path / "out") and config.checkpoint.weights_only
    assert convert(tmp_path / "megatron", "megatron_lite", tmp_path / "out") == 2
    assert "config.json is there already; give another folder" in capsys.readouterr().err


def test_a_model_that_only_the_user_knows(tmp_path, capsys):
    """Who gives a configuration starts a run from that one; none is written."""
    source = write_torch_dist(tmp_path / "megatron", plain())
    assert convert(source, "megatron_lite", tmp_path / "out") == 2
    assert "give that with --config FILE" in capsys.readouterr().err
    model = model_of(PLAIN, 24).model_dump(mode="json")
    train = {"micro_batch_size": 1, "global_batch_size": 1, "steps": 1, "output_dir": "x"}
    config = {"model": model, "train": train, "optimizer": {"lr": 0.1, "schedule": "constant"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert(source, "megatron_lite", tmp_path / "out", "--config", str(tmp_path / "config.json")) == 0
    with Reader(resolve(tmp_path / "out")) as reader:
        assert reader.metadata["config"]["train"]["output_dir"] == "x" and reader.step == 0
    begin = f"--config {tmp_path / 'config.json'} --set checkpoint.load={tmp_path / 'out'}"
    assert capsys.readouterr().out.endswith(f"with {begin} --set checkpoint.weights_only=true\n")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("to", "flags", "says"),
    [
        ("hf", ["--tensor", "2"], "--tensor has no effect with --to hf"),
        ("safetensors", ["--weights-only"], "--weights-only has no effect with --to safetensors"),
        (
            "megatron_lite",
            ["--config", "x"],
            "--config has no effect with --to megatron_lite from a check",
        ),
        ("megatron_lite", ["--family", "llama"], "--family has no effect"),
        ("megatron_lite", ["--tokenizer", "byte"], "--tokenizer has no effect"),
        (
            "megatron_lite",
            ["--data", "2", "--shard-gb", "1"],
            "the files of a layout are as large as its ranks' parts",
        ),
        ("megatron_lite", ["--shard-gb", "0"], "--shard-gb must be at least 1e-6"),
        ("megatron_lite", ["--dtype", "bf16"], "rounds the fp32 weights"),
        ("megatron_lite", ["--tensor", "3"], "does not divide over 3 tensor-parallel ranks"),
    ],
)
def test_options_without_effect_are_errors(run, tmp_path, capsys, to, flags, says):
    assert convert(run, to, tmp_path / "out", *flags) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "flags", "says"),
    [
        ("hf", ["--tokenizer", "hf:/none"], "/none: cannot be read"),
        ("hf", ["--family", "llama"], "cannot be exported as llama, only as gpt2"),
        ("hf", [], "out holds safetensors files already; give an empty folder"),
        ("safetensors", [], "out holds safetensors files already; give an empty folder"),
        ("megatron_lite", [], "checkpoints holds checkpoints already; give another folder"),
        ("megatron_lite", ["--dtype", "bf16"], "that training goes on from; give --weights-only, too"),
    ],
)
def test_what_is_wrong_is_said_before_all_is_read(run, tmp_path, capsys, monkeypatch, to, flags, says):
    if not flags:
        assert convert(run, to, tmp_path / "out", "--no-check") == 0
    monkeypatch.setattr(Reader, "verify", lambda *_, **__: pytest.fail("hours may be gone by now"))
    assert convert(run, to, tmp_path / "out", *flags) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype", "bf16"],
        ["--shard-gb", "0.0001"],
        ["--family", "llama"],
        ["--tokenizer", "byte"],
        ["--tensor", "2"],
        ["--weights-only"],
        ["--config", "x"],
    ],
)
def test_an_import_from_hugging_face_takes_no_options(tmp_path, capsys, flags):
    """They are told apart from those of an export."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    assert convert(tmp_path / "theirs", "megatron_lite", tmp_path / "out", *flags) == 2
    says = f"{flags[0]} has no effect with --to megatron_lite from a Hugging Face folder"
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--no-check"]])
def test_what_is_imported_is_read_back_unless_unasked(run, tmp_path, monkeypatch, flags):
    assert convert(run, "hf", tmp_path / "hf", "--no-check") == 0
    verified = []
    monkeypatch.setattr(Reader, "verify", lambda reader: verified.append(reader.path))
    assert convert(tmp_path / "hf", "megatron_lite", tmp_path / "back", *flags) == 0
    assert verified == ([] if flags else [resolve(tmp_path / "back")])


@pytest.mark.parametrize("to", ["hf", "safetensors", "megatron_lite"])
def test_nothing_is_written_into_a_run(run, capsys, to):
    assert convert(run, to, run, "--no-check") == 2
    assert f"{run} holds checkpoints already; give another folder" in capsys.readouterr().err.replace(
        "/checkpoints h", " h"
    )
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


@contextlib.contextmanager
def holder(target):
    """A process that holds a folder, killed in the end."""
    ready, told = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with held(target):
                os.write(told, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1) == b"1"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("to", ["hf", "safetensors", "megatron_lite"])
@pytest.mark.parametrize("there", [False, True])
def test_one_conversion_at_a_time_writes_in_a_folder(run, tmp_path, capsys, to, there):
    """Whether the folder was there or not; a kill lets go of it, and no file of the lock is left."""
    target = tmp_path / "exported" / "out"
    if there:
        target.mkdir(parents=True)
    with holder(target):
        assert convert(run, to, target, "--no-check") == 2
        remedy = "wait for its end, stop it, or give another folder"
        assert capsys.readouterr().err == f"error: another conversion writes in {target}; {remedy}\n"
        assert list(target.iterdir()) == []
    assert convert(run, to, target, "--no-check") == 0
    assert convert(run, to, tmp_path / "alone", "--no-check") == 0
    assert sorted(os.listdir(target)) == sorted(os.listdir(tmp_path / "alone"))


def test_a_folder_that_cannot_be_locked_or_made(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert convert(run, "safetensors", tmp_path / "out") == 0
    (tmp_path / "file").touch()
    for target, says in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "out", "Not a directory")):
        assert convert(run, "safetensors", target) == 2
        assert capsys.readouterr().err == f"error: --save {target}: {says}; give another folder\n"


def no_locks(*_):
    raise OSError(errno.EBADF, "Bad file descriptor")


@pytest.mark.parametrize("to", ["hf", "safetensors", "megatron_lite"])
def test_room_is_looked_at_before_all_is_written(run, tmp_path, capsys, monkeypatch, to):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert convert(run, to, tmp_path / "out") == 2
    assert "0.0 GB are to be written, and 0.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "safetensors", "megatron_lite"])
def test_what_fails_leaves_no_folders(run, tmp_path, capsys, monkeypatch, to):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_lite.checkpoint.store.write_safetensors", full)
    monkeypatch.setattr("megatron_lite.checkpoint.huggingface.exporting.write_safetensors", full)
    assert convert(run, to, tmp_path / "exported" / "out") == 2
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "exported").exists()


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_exports_are_of_our_checkpoints(run, tmp_path, capsys, to):
    assert convert(run, "hf", tmp_path / "hf", "--no-check") == 0
    assert convert(tmp_path / "hf", to, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert (
        "hf is a Hugging Face folder, and --to" in said and "import it first with --to megatron_lite" in said
    )


@pytest.mark.parametrize("to", ["hf", "safetensors", "megatron_lite"])
def test_any_size_of_files(run, tmp_path, capsys, to):
    for size in ("inf", "1e300"):
        assert convert(run, to, tmp_path / size, "--shard-gb", size, "--no-check") == 0
        assert len(list((tmp_path / size).rglob("*.safetensors"))) == 1
    for size in ("nan", "-1", "1e-12"):
        assert convert(run, to, tmp_path / "out", "--shard-gb", size) == 2
        assert "--shard-gb must be at least 1e-6" in capsys.readouterr().err


def test_layouts_are_for_our_checkpoints(tmp_path, capsys):
    source = write_torch_dist(tmp_path / "megatron", plain(), PLAIN)
    assert convert(source, "megatron_lite", tmp_path / "out", "--tensor", "2") == 2
    assert "import it first, then convert what came of it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(source, "megatron_lite", tmp_path / "out", "--tensor", "0")
    assert "must be 1 or more" in capsys.readouterr().err
