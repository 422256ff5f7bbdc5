"""The main job as a user runs it: what it writes, how it ends, how it goes on, and what it says of bad input."""

import importlib.util
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_lite.checkpoint.store as store
from megatron_lite.checkpoint import Reader, find_latest
from megatron_lite.config import load_config
from megatron_lite.data import IndexedDatasetWriter
from megatron_lite.data.audit import audit
from megatron_lite.training.metrics import Metrics
from megatron_lite.training.output import LOCK
from megatron_lite.training.schedule import learning_rate
from tests.command_line import TINY, Result, repeatable, rows, run_command, words, write_bytes
from tests.distributed import RankFailed

STEPS = "train.steps=6"
LOSS, NORM = 2e-6, 1e-5


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bytes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted, on one rank, with a checkpoint every two."""
    output = tmp_path_factory.mktemp("finished")
    ok(run_command(words(prefix, output, STEPS, "checkpoint.interval=2", "checkpoint.keep=0")))
    return output


def ok(results: list[Result]) -> str:
    """What the first rank printed, of a command that ended well and quietly."""
    assert [result.status for result in results] == [0] * len(results), results
    assert [result.err for result in results] == [""] * len(results)
    assert [result.out for result in results[1:]] == [""] * (len(results) - 1), "only the first rank speaks"
    return results[0].out


def tensors(output: Path, step: int) -> dict[tuple[str, str], bytes]:
    """All of a checkpoint's numbers."""
    with Reader(output / f"checkpoints/step_{step:08d}") as reader:
        return {
            (name, kind): reader.read(name, kind).numpy().tobytes()
            for kind in reader.kinds
            for name in reader.names(kind)
        }


def assert_same_run(output: Path, finished: Path, first: int = 1) -> None:
    """Bit for bit, steps and weights."""
    assert repeatable(output) == [row for row in repeatable(finished) if row["step"] >= first]
    assert tensors(output, 6) == tensors(finished, 6)


def at_step(step: int, action: Callable[[], Any]) -> None:
    """In this process, `action` is called when `step` has been done."""
    report = Metrics.end_step

    def end_step(self: Metrics, done: int, *rest: Any) -> None:
        report(self, done, *rest)
        if done == step:
            action()

    Metrics.end_step = end_step  # type: ignore[method-assign]


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------------------------ what it writes


def test_metrics_hold_a_row_a_step(finished: Path, prefix: str) -> None:
    config = load_config(TINY, [f"data.train={prefix}", STEPS, "optimizer.warmup_steps=0"])
    found = rows(finished)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in found] == [8 * 32 * step for step in range(1, 7)]
    assert [row["lr"] for row in found] == [learning_rate(config, step) for step in range(6)]
    assert found[-1]["loss"] < found[0]["loss"] - 0.05
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in found)
    text = (finished / "metrics.jsonl").read_text().splitlines()[0]
    loss = np.float32(found[0]["loss"])
    assert float(loss) == found[0]["loss"] and repr(float(loss)) in text, "a float32 printed in full"


def test_console_says_what_runs_and_how_far_it_is(prefix: str, tmp_path: Path) -> None:
    out = ok(
        run_command(words(prefix, tmp_path, "train.steps=2", "train.eval_interval=2", "data.split=9,1,0"))
    )
    for part in ("1 rank under", "on cpu (gloo)", "tensor 1 x pipeline 1 x data 1, ZeRO-1"):
        assert part in out
    for part in ("vocabulary 257 padded to 384", "16 training samples of 32 tokens", "kernels: attention  "):
        assert part in out
    for part in ("step 1/2 ( 50%) | loss 5.", "step 2/2 (100%)", "step 2 | valid loss ", "done at step 2"):
        assert part in out


def test_ranks_train_as_one_process_and_only_the_first_speaks(
    prefix: str, tmp_path: Path, finished: Path
) -> None:
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=1")
    out = ok(run_command(words(prefix, tmp_path, STEPS, *layout), ranks=4))
    assert "4 ranks under" in out and "tensor 2 x pipeline 2 x data 1" in out
    assert_close(repeatable(tmp_path), repeatable(finished))


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=LOSS)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=NORM)
        assert (row["lr"], row["tokens"]) == (other["lr"], other["tokens"])


def test_bf16_prints_nothing_of_deepspeed(prefix: str, tmp_path: Path) -> None:
    arguments = words(prefix, tmp_path, "train.steps=1", "train.precision=bf16")
    out = ok(run_command([*arguments, "--set", "parallel.pipeline=2"], ranks=2))
    assert "Virtual Memory" not in out and "DeepSpeed" not in out
    # Which kernels serve depends on the machine, what indices are built on the tests before.
    lines = [line for line in out.splitlines() if "kernels: " not in line and ": built in " not in line]
    assert len(lines) == 6


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_rows(prefix: str, tmp_path: Path) -> None:
    settings = ("train.eval_interval=2", "train.eval_steps=3", "data.split=80,10,10", "train.steps=5")
    arguments = words(prefix, tmp_path, *settings, "train.exit_after_steps=3")
    ok(run_command(arguments))
    assert [row["step"] for row in rows(tmp_path) if "valid_loss" in row] == [2], "a part's end is no end"
    ok(run_command(arguments))
    found = rows(tmp_path)
    assert [row["step"] for row in found if "valid_loss" in row] == [2, 4, 5]
    assert [row["step"] for row in found if "test_loss" in row] == [5]
    losses = [row["valid_loss"] for row in found if "valid_loss" in row]
    assert losses[0] > losses[-1] > 1


def test_evaluation_data_of_one_sample_are_repeated(prefix: str, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "one", np.uint16) as writer:
        writer.add_sequence(np.arange(33))
        writer.end_document()
    settings = (f"data.valid={tmp_path}/one", "train.eval_interval=1", "train.steps=2")
    ok(run_command(words(prefix, tmp_path, *settings)))
    assert all(row["valid_loss"] > 1 for row in rows(tmp_path) if "valid_loss" in row)


def test_evaluation_data_that_do_not_fill_a_batch_give_a_warning_not_a_loss(
    prefix: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_sequence(np.arange(65))
            writer.end_document()
    blend = json.dumps([f"{tmp_path}/one", f"{tmp_path}/two"])
    settings = (f"data.valid={blend}", "data.order=megatron", "train.eval_interval=1", "train.steps=2")
    out = ok(run_command(words(prefix, tmp_path, *settings)))
    assert "no valid loss: the data are less than one global batch (4 samples)" in out
    assert not any("valid_loss" in row for row in rows(tmp_path))


# ------------------------------------------------------------------------------------------------ going on


def test_exit_after_steps_then_the_same_command(prefix: str, tmp_path: Path, finished: Path) -> None:
    arguments = words(prefix, tmp_path, STEPS, "train.exit_after_steps=2")
    for last in (2, 4, 6):
        assert f"done at step {last}" in ok(run_command(arguments))
        assert repeatable(tmp_path) == repeatable(finished)[:last]
    assert_same_run(tmp_path, finished)
    before = snapshot(tmp_path)
    assert "nothing to do: step 6 is done, and train.steps is 6" in ok(run_command(arguments))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, prefix: str, tmp_path: Path, finished: Path
) -> None:
    arguments = words(prefix, tmp_path, STEPS)
    out = ok(run_command(arguments, first=lambda: at_step(3, lambda: kill_self(number))))
    assert f"stopped by {number.name}: the same command goes on from here" in out
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert "starting from " in ok(run_command(arguments))
    assert_same_run(tmp_path, finished)


def test_kill_in_a_save_leaves_the_checkpoint_before(prefix: str, tmp_path: Path, finished: Path) -> None:
    arguments = words(prefix, tmp_path, STEPS, "checkpoint.interval=2")

    write = store.write_index

    def die_writing(folder: Path, index: Any) -> None:
        write(folder, index)
        if index.step == 4:  # that of step 2, beside training, may be late
            kill_self(signal.SIGKILL)

    def deadly() -> None:
        store.write_index = die_writing

    with pytest.raises(RankFailed, match="rank 0 died"):
        run_command(arguments, first=deadly)
    assert (tmp_path / "checkpoints/step_00000004.tmp").is_dir(), "it was killed in the middle"
    out = ok(run_command(arguments))
    assert "step_00000002 at step 2" in out
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_another_layout(ranks: int, prefix: str, tmp_path: Path, finished: Path) -> None:
    """Other tensor, pipeline and data-parallel sizes, and another micro batch: the same samples, the same loss."""
    layout = ("parallel.tensor=2", "parallel.pipeline=1", "train.micro_batch_size=1")
    ok(run_command(words(prefix, tmp_path, STEPS, "train.exit_after_steps=3", *layout), ranks=4))
    out = ok(run_command(words(prefix, tmp_path, STEPS), ranks=ranks))
    assert "at step 3" in out
    assert_close(repeatable(tmp_path), repeatable(finished))


def test_with_another_global_batch_the_data_go_on(prefix: str, tmp_path: Path) -> None:
    """More samples than steps x batch are read in all, where the beginning had larger batches."""
    ok(run_command(words(prefix, tmp_path, "train.steps=3", "train.global_batch_size=16")))
    ok(run_command(words(prefix, tmp_path, "train.steps=5", "train.global_batch_size=8")))
    assert [row["tokens"] for row in rows(tmp_path)] == [32 * n for n in (16, 32, 48, 56, 64)]


def test_with_another_mixture_and_length_no_document_is_repeated(tmp_path: Path) -> None:
    """And with other ranks, weights and packing; what was consumed is told by the checkpoint, token by token."""
    first, second = (write_bytes(tmp_path / name) for name in "ab")
    output = tmp_path / "run"
    fixed = ("data.split=1", "model.position_embedding=rope", "model.max_position_embeddings=32")
    ok(run_command(words(first, output, *fixed, "train.steps=3")))
    changes = (
        (1, "train.steps=6", f'data.train=[[2, "{second}"], [1, "{first}"]]'),
        (2, "train.steps=8", f'data.train=[[1, "{second}"], [1, "{first}"]]', "model.seq_length=16"),
        (1, "train.steps=10", f'data.train=[[1, "{second}"]]', "data.packing=best_fit"),
    )
    tokens = [32 * 8] * 3
    for ranks, *settings in changes:
        out = ok(run_command(words(first, output, *fixed, *settings), ranks))
        assert "goes on after the" in out and "may be repeated" not in out
        own = 16 if "model.seq_length=16" in settings else 32
        tokens += [own * 8] * (3 if settings[0] == "train.steps=6" else 2)
    _, sources = audit(output)
    assert [row["tokens"] for row in rows(output)] == np.cumsum(tokens).tolist()
    assert [source.prefix for source in sources] == [second, first]
    assert sum(source.samples for source in sources) == 80
    given = {source.prefix: source.samples for source in sources}
    assert given == {first: 24 + 8 + 8, second: 16 + 8 + 16}
    assert all((source.inputs <= source.lengths).all() for source in sources), "within their first epoch"


def test_damaged_checkpoint_falls_back_to_the_one_before(prefix: str, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    (tmp_path / "checkpoints/step_00000006/rank_00000.safetensors").unlink()
    damage(tmp_path / "checkpoints/step_00000004/rank_00000.safetensors")
    out = ok(run_command(words(prefix, tmp_path, STEPS)))
    assert "step_00000006 cannot be used" in out and "step_00000004 cannot be used" in out
    assert "step_00000002 at step 2" in out
    assert_same_run(tmp_path, finished)


def damage(path: Path) -> None:
    """One bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_resume_never_starts_afresh(prefix: str, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    ok(
        run_command(
            words(prefix, tmp_path, "train.steps=2", "optimizer.decay_steps=6", "checkpoint.resume=never")
        )
    )
    assert repeatable(tmp_path) == repeatable(finished)[:2]


def test_load_goes_on_from_another_run(prefix: str, tmp_path: Path, finished: Path) -> None:
    step = finished / "checkpoints/step_00000004"
    ok(run_command(words(prefix, tmp_path, STEPS, f"checkpoint.load={step}")))
    assert_same_run(tmp_path, finished, first=5)


def test_load_weights_only_begins_at_step_one_with_trained_weights(
    prefix: str, tmp_path: Path, finished: Path
) -> None:
    load = (f"checkpoint.load={finished}", "checkpoint.weights_only=true")
    arguments = words(prefix, tmp_path, "train.steps=2", "optimizer.decay_steps=6", *load)
    ok(run_command([*arguments, "--set", "train.exit_after_steps=1"]))
    found, old = rows(tmp_path), rows(finished)
    assert (found[0]["step"], found[0]["tokens"], found[0]["lr"]) == (1, 256, old[0]["lr"])
    assert found[0]["loss"] < old[0]["loss"] - 0.05
    out = ok(run_command(arguments))
    assert "at step 1" in out, "its own checkpoint counts more, with its optimizer state"
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


# ------------------------------------------------------------------------------------------------ bad input


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but the one that says which process holds the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path): path.read_bytes() for path in files}


def truncated(data: Path, run: Path) -> tuple[list[str], str]:
    (data / "bytes.bin").write_bytes((data / "bytes.bin").read_bytes()[:-1001])
    return [], f"{data}/bytes.bin: "


def wrong_index(data: Path, run: Path) -> tuple[list[str], str]:
    (data / "bytes.idx").write_bytes(b"NOTINDEX" + (data / "bytes.idx").read_bytes()[8:])
    return [], f"{data}/bytes.idx: not an index of Megatron's format"


def missing_data(data: Path, run: Path) -> tuple[list[str], str]:
    (data / "bytes.bin").unlink()
    return [], f"data.train: {data}/bytes.bin: no such file"


def no_data(data: Path, run: Path) -> tuple[list[str], str]:
    return ["data.train=null"], "data.train: is required to train"


def empty_training_split(data: Path, run: Path) -> tuple[list[str], str]:
    return ["data.split=0,1,0"], "data.split: "


def empty_validation_split(data: Path, run: Path) -> tuple[list[str], str]:
    return ["data.split=1,0,0", "train.eval_interval=1"], "there is no validation data"


def empty_documents(data: Path, run: Path) -> tuple[list[str], str]:
    with IndexedDatasetWriter(data / "bytes", np.uint16) as writer:
        writer.end_document()
    return [], f"{data}/bytes"


def another_tokenizer(data: Path, run: Path) -> tuple[list[str], str]:
    return ["data.tokenizer=null", "model.vocab_size=100"], "the data was written with another tokenizer"


def too_few_ranks(data: Path, run: Path) -> tuple[list[str], str]:
    return ["parallel.tensor=4", "parallel.pipeline=2"], "needs a multiple of 8 ranks"


def unknown_key(data: Path, run: Path) -> tuple[list[str], str]:
    return ["train.stpes=3"], "train.stpes: unknown key; did you mean train.steps?"


def output_is_a_file(data: Path, run: Path) -> tuple[list[str], str]:
    return [f"train.output_dir={data}/bytes.idx"], "train.output_dir: cannot write in "


def output_not_writable(data: Path, run: Path) -> tuple[list[str], str]:
    return ["train.output_dir=/proc/run"], "train.output_dir: cannot write in /proc/run"


def missing_shard(data: Path, run: Path) -> tuple[list[str], str]:
    for step in (2, 4, 6):
        (run / f"checkpoints/step_{step:08d}/rank_00000.safetensors").unlink()
    return [], "no checkpoint is whole"


def damaged_load(data: Path, run: Path) -> tuple[list[str], str]:
    path = run / "checkpoints/step_00000004"
    damage(path / "rank_00000.safetensors")
    return ["checkpoint.resume=never", f"checkpoint.load={path}"], "rank_00000.safetensors"


def load_of_nothing(data: Path, run: Path) -> tuple[list[str], str]:
    return ["checkpoint.resume=never", f"checkpoint.load={data}"], f"{data}: no checkpoint there"


def nothing_to_resume(data: Path, run: Path) -> tuple[list[str], str]:
    settings = [f"train.output_dir={data}/new", "checkpoint.resume=required"]
    return settings, "checkpoint.resume is required, but "


def another_model(data: Path, run: Path) -> tuple[list[str], str]:
    return ["model.num_layers=8"], "is of another model: blocks."


BAD = [
    truncated,
    wrong_index,
    missing_data,
    no_data,
    empty_training_split,
    empty_validation_split,
    empty_documents,
    another_tokenizer,
    too_few_ranks,
    unknown_key,
    output_is_a_file,
    output_not_writable,
    missing_shard,
    damaged_load,
    load_of_nothing,
    nothing_to_resume,
    another_model,
]


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_message_and_status_two(
    spoil: Callable[[Path, Path], tuple[list[str], str]], finished: Path, tmp_path: Path
) -> None:
    """On two ranks, so that one which finds nothing wrong is seen to end as well."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    shutil.copytree(finished, run)
    settings, expected = spoil(data, run) if write_bytes(data) else ([], "")
    before = snapshot(tmp_path)
    arguments = words(f"{data}/bytes", run, "train.steps=8", "parallel.pipeline=2", *settings)
    first, second = run_command(arguments, ranks=2)
    assert (first.status, second.status) == (2, 2)
    assert first.err.startswith("error: ") and first.err.count("error: ") == 1
    assert expected in first.err
    assert "Traceback" not in first.err
    assert second.err == second.out == ""
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in before} == before, "nothing is lost"


@pytest.mark.parametrize(
    ("setting", "package"),
    [("logging.tensorboard=true", "tensorboard"), ("logging.wandb_project=x", "wandb")],
)
def test_missing_package_is_told_before_the_model_is_built(
    setting: str, package: str, prefix: str, tmp_path: Path
) -> None:
    def forget() -> None:
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == package else find(name)  # type: ignore[assignment, misc]

    (result,) = run_command(words(prefix, tmp_path, setting), first=forget)
    assert result.status == 2
    assert (
        result.err
        == f"error: {setting.partition('=')[0]} needs the {package} package: pip install {package}\n"
    )
    assert result.out == ""


def test_kernels_that_cannot_serve_are_told_before_the_data_are_opened(prefix: str, tmp_path: Path) -> None:
    settings = ("kernels.attention=fa3", "kernels.linear=fp8", "kernels.norm=reference")
    results = run_command(words(prefix, tmp_path / "run", *settings), ranks=2)
    assert [(result.status, result.out) for result in results] == [(2, "")] * 2
    (said,) = [result.err for result in results if result.err]
    first, second = said.splitlines()
    assert first.startswith(
        "error: kernels.attention: flash_attn_3 cannot serve this run: it needs an NVIDIA GPU"
    )
    assert "; what can: auto, " in first
    assert second.startswith(
        "kernels.linear: fp8 cannot serve this run: it needs an NVIDIA GPU; it takes bf16"
    )
    assert second.endswith("; what can: auto, torch")
    assert not (tmp_path / "run").exists()


def as_another_rank() -> None:
    """The command takes itself for the second rank, which leaves it to the first to say what both know."""
    os.environ.update(RANK="1", LOCAL_RANK="1")


@pytest.mark.parametrize("first", [lambda: None, as_another_rank], ids=["first rank", "another"])
def test_bad_token_found_on_the_way_is_told_by_the_rank_that_found_it(
    first: Callable[[], None], tmp_path: Path
) -> None:
    """The first batch is read before the model is built; what comes later ends the run with what was saved."""
    ids = np.arange(33 * 40) % 250
    ids[-40:] = 60_000
    with IndexedDatasetWriter(tmp_path / "late", np.uint16) as writer:
        for part in ids.reshape(40, 33):
            writer.add_sequence(part)
            writer.end_document()
    settings = ("train.steps=40", "checkpoint.interval=1", "data.split=1", "train.seed=6")
    arguments = words(f"{tmp_path}/late", tmp_path, "train.global_batch_size=2", *settings)
    (result,) = run_command(arguments, first=first)
    assert result.status == 1
    assert result.err.startswith("error: rank 0 (tensor 0, pipeline 0, data 0): token ids from ")
    assert result.err.count("\n") == 1
    done = rows(tmp_path)[-1]["step"]
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == f"step_{done:08d}"


def test_nan_ends_the_run_with_its_layer(prefix: str, tmp_path: Path) -> None:
    def spoil() -> None:
        from megatron_lite.model.mlp import MLP

        forward = MLP.forward
        calls = []

        def bad(self: Any, *args: Any) -> Any:
            calls.append(self)
            return forward(self, *args) * (float("nan") if len(calls) > 16 and self is calls[1] else 1)

        MLP.forward = bad  # type: ignore[method-assign]

    arguments = words(prefix, tmp_path, STEPS, "checkpoint.interval=1")
    (result,) = run_command(arguments, first=spoil)
    assert result.status == 1
    assert result.err.startswith("error: step 2: the loss is not finite; it first appears on rank 0 ")
    assert "in the output of blocks.1." in result.err and result.err.count("\n") == 1
    assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize("background", ["true", "false"], ids=["async", "sync"])
def test_full_disk_ends_the_run_on_every_rank(background: str, prefix: str, tmp_path: Path) -> None:
    write = store.write_safetensors

    def write_until_full(path: Path, *args: Any) -> Any:
        if path.parts[-2:] == ("step_00000020.tmp", "rank_00000.safetensors"):
            raise OSError(28, "No space left on device")
        return write(path, *args)

    settings = (f"checkpoint.async_save={background}", "checkpoint.interval=10", "parallel.pipeline=2")
    arguments = words(prefix, tmp_path, "train.steps=30", *settings)
    first, second = run_command(
        arguments, ranks=2, first=partial(setattr, store, "write_safetensors", write_until_full)
    )
    assert (first.status, second.status) == (1, 1)
    assert first.err.startswith("error: ") and "step_00000020 was not saved" in first.err
    assert "No space left on device" in first.err and first.err.count("\n") == 1
    assert second.err == ""
    assert rows(tmp_path)[-1]["step"] < 30, "a step says so, not the next save"
    latest = find_latest(tmp_path, checksums=True)
    assert latest is not None and latest.name == "step_00000010"


def test_an_error_waits_for_the_save_that_runs(prefix: str, tmp_path: Path) -> None:
    """The save of step 2 is slow, and step 3 fails: what was being saved is whole."""
    write = store.write_safetensors

    def slowly(*args: Any) -> Any:
        time.sleep(0.5)
        return write(*args)

    def begin() -> None:
        store.write_safetensors = slowly
        at_step(3, raise_run_failed)

    settings = ("checkpoint.interval=2", "train.exit_after_steps=5")
    (result,) = run_command(words(prefix, tmp_path, STEPS, *settings), first=begin)
    assert (result.status, result.err) == (1, "error: enough\n")
    assert "step 2 | saved " in result.out
    latest = find_latest(tmp_path, checksums=True)
    assert latest is not None and latest.name == "step_00000002"


def raise_run_failed() -> None:
    from megatron_lite.training.resilience import RunFailed

    raise RunFailed("enough")


def test_training_goes_on_while_it_is_saved_and_the_next_save_waits(prefix: str, tmp_path: Path) -> None:
    """A save that lasts three steps: they are taken meanwhile, and it is published before the next begins."""
    write, steps = store.write_safetensors, threading.Semaphore(0)

    def after_two_more_steps(path: Path, *args: Any) -> Any:
        if path.parent.name == "step_00000002.tmp":
            assert steps.acquire(timeout=60) and steps.acquire(timeout=60)
        elif path.parent.name == "step_00000004.tmp":
            assert (tmp_path / "checkpoints/latest").read_text().startswith("step_00000002 crc32:")
        return write(path, *args)

    def begin() -> None:
        store.write_safetensors = after_two_more_steps
        for step in (3, 4):
            at_step(step, steps.release)

    ok(run_command(words(prefix, tmp_path, STEPS, "checkpoint.interval=2"), first=begin))
    latest = find_latest(tmp_path, checksums=True)
    assert latest is not None and latest.name == "step_00000006"


def test_async_saves_what_sync_saves(prefix: str, tmp_path: Path, finished: Path) -> None:
    """Every checkpoint of the run that saved while it trained: bit for bit, and metadata but for the setting."""
    settings = (STEPS, "checkpoint.interval=2", "checkpoint.keep=0", "checkpoint.async_save=false")
    ok(run_command(words(prefix, tmp_path, *settings)))
    for step in (2, 4, 6):
        assert tensors(tmp_path, step) == tensors(finished, step)
        metadata = []
        for output in (tmp_path, finished):
            with Reader(output / f"checkpoints/step_{step:08d}") as reader:
                metadata.append(reader.metadata)
        assert metadata[0].pop("config") != metadata[1].pop("config")
        assert metadata[0] == metadata[1]


def test_weights_alone_are_saved_apart(prefix: str, tmp_path: Path, finished: Path) -> None:
    settings = (STEPS, "checkpoint.weights_interval=2", "checkpoint.keep=1", "checkpoint.interval=4")
    ok(run_command(words(prefix, tmp_path, *settings)))
    names = ["latest", "step_00000002", "step_00000004", "step_00000006"]
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == names, "keep is not about them"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000006"]
    for step in (2, 4, 6):
        full = finished / f"checkpoints/step_{step:08d}"
        with Reader(tmp_path / f"weights/step_{step:08d}") as light, Reader(full) as reader:
            light.verify()
            assert light.kinds == ["weight"] and light.names() == reader.names()
            for name in light.names():
                assert light.read(name).equal(reader.read(name).bfloat16())
    load = (f"checkpoint.load={tmp_path}/weights", f"train.output_dir={tmp_path}/next")
    (result,) = run_command(words(prefix, tmp_path, STEPS, *load))
    assert result.status == 2 and "holds weights only, no optimizer state" in result.err
    ok(run_command(words(prefix, tmp_path, STEPS, *load, "checkpoint.weights_only=true")))
    assert rows(tmp_path / "next")[0]["loss"] < rows(finished)[0]["loss"] - 0.05
