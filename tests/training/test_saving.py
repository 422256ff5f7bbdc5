"""Where a run starts from, and that no rank waits for one that found a fault."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import Reader, resolve
from megatron_lite.checkpoint import latest as latest_module
from megatron_lite.checkpoint.reshard import reshard
from megatron_lite.training import saving
from megatron_lite.training.saver import Saver
from megatron_lite.training.saving import (
    TOKENIZER,
    Progress,
    agreed_failure,
    find_start,
    load_checkpoint,
    read_progress,
)
from tests.distributed import run_ranks
from tests.training_case import Case, import_what_ranks_import, load_start, make_engine, train


def make(folder: Path | str, **settings: Any) -> Case:
    return Case(
        settings={"train.output_dir": str(folder)} | {k.replace("__", "."): v for k, v in settings.items()}
    )


def save_two(case: Case) -> None:
    """Steps 1 and 2 of a run, each saved."""
    engine = make_engine(case.config())
    for step in (1, 2):
        train(engine, range(step - 1, step))
        Saver(engine).save(Progress(step, step * 8, step * 128), last=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_what_ranks_import()
    folder = tmp_path_factory.mktemp("run")
    run_ranks(1, save_two, make(folder))
    return folder


def start(case: Case) -> tuple[str | None, Progress]:
    path = next(find_start(case.config()))
    return None if path is None else str(path), read_progress(case.config(), path)


def started(case: Case) -> tuple[str | None, Progress]:
    (result,) = run_ranks(1, start, case)
    return result


def failing(case: Case) -> str:
    with pytest.raises(ValueError) as error:
        start(case)
    return str(error.value)


def test_newest_of_the_output_folder(run: Path) -> None:
    assert started(make(run)) == (f"{run}/checkpoints/step_00000002", Progress(2, 16, 256))
    assert started(make(run, checkpoint__resume="required"))[1].step == 2
    assert started(make(run, checkpoint__load="/nowhere"))[1].step == 2, "its own checkpoints count more"


def test_nothing_there_is_a_fresh_start(run: Path, tmp_path: Path) -> None:
    assert started(make(tmp_path)) == (None, Progress())
    assert started(make(run, checkpoint__resume="never")) == (None, Progress())


def test_required_but_nothing_there(tmp_path: Path) -> None:
    (message,) = run_ranks(1, failing, make(tmp_path, checkpoint__resume="required"))
    assert message.startswith(f"checkpoint.resume is required, but {tmp_path} holds no checkpoint; set ")


def test_load_another_run(run: Path, tmp_path: Path) -> None:
    step = f"{run}/checkpoints/step_00000001"
    assert started(make(tmp_path, checkpoint__load=step)) == (step, Progress(1, 8, 128))
    assert started(make(tmp_path, checkpoint__load=str(run)))[1].step == 2


def test_weights_only_is_a_fresh_start_but_not_of_the_run_itself(run: Path, tmp_path: Path) -> None:
    load = {"checkpoint__load": str(run), "checkpoint__weights_only": True}
    path, progress = started(make(tmp_path, **load))
    assert path is not None and progress == Progress()
    assert started(make(run, **load))[1].step == 2
    assert started(make(run / "checkpoints", **load))[1].step == 2
    assert started(make(run, **load, checkpoint__resume="never"))[1] == Progress()


def go_on(case: Case) -> int:
    """One step from where the run starts, saved; the step it started at."""
    config = case.config()
    path = next(find_start(config))
    progress, engine = read_progress(config, path), make_engine(config)
    assert path is not None
    load_checkpoint(engine, path)
    with Reader(path) as reader:
        mine = dict(engine.named_parameters())["embed.weight"]
        assert torch.equal(mine, reader.read("embed.weight"))
    train(engine, range(progress.step, progress.step + 1))
    Saver(engine).save(Progress(progress.step + 1, 8, 128), last=True)
    return progress.step


@pytest.mark.parametrize("into", ["checkpoints", ""], ids=["run", "checkpoints-folder"])
def test_weights_imported_into_the_output_folder_are_a_start(into: str, run: Path, tmp_path: Path) -> None:
    reshard(resolve(run), tmp_path, weights_only=True)
    output = tmp_path if into else tmp_path / "checkpoints"
    (message,) = run_ranks(1, failing, make(output))
    assert message.endswith("to begin at step 0 with its weights, set checkpoint.weights_only to true")
    only = {"checkpoint__weights_only": True}
    for settings in ({}, {"checkpoint__load": str(output), "checkpoint__resume": "never"}):
        assert started(make(output, **only, **settings))[1] == Progress()
    assert [*run_ranks(1, go_on, make(output, **only)), *run_ranks(1, go_on, make(output, **only))] == [0, 1]


def test_every_rank_hears_of_what_one_finds(tmp_path: Path) -> None:
    messages = run_ranks(3, one_finds, ValueError("no tokens"))
    assert messages == ["rank 1: no tokens"] * 3
    messages = run_ranks(2, one_finds, PermissionError(13, "Permission denied", "/data"))
    assert messages == ["rank 1: [Errno 13] Permission denied: '/data'"] * 2
    assert run_ranks(2, all_find) == ["the same"] * 2


def one_finds(fault: Exception) -> str:
    with pytest.raises(ValueError) as error, agreed_failure():
        if dist.get_rank() == 1:
            raise fault
    return str(error.value)


def all_find() -> str:
    with pytest.raises(ValueError) as error, agreed_failure():
        raise ValueError("the same")
    return str(error.value)


def load_other(case: Case, path: str) -> str:
    engine = make_engine(case.config())
    with pytest.raises(ValueError) as error:
        load_checkpoint(engine, Path(path))
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ({"num_layers": 6}, r"blocks\.4\.[a-z_.]+ is missing"),
        ({"hidden_size": 64}, r"[a-z0-9_.]+ is \(32,\), the model's is \(64,\)"),
        ({"num_layers": 2}, r"blocks\.2\.[a-z_.]+ is not in the model"),
    ],
    ids=["deeper", "wider", "shallower"],
)
def test_another_model_is_told_by_parameter(model: dict[str, Any], fault: str, run: Path) -> None:
    path = str(resolve(run))
    (message,) = run_ranks(1, load_other, Case(model=model), path)
    assert re.match(re.escape(path) + " is of another model: " + fault, message)
    assert re.search(r"; and \d+ more\. Compare the model section$", message)
    assert message.count(";") == 5, "not all of a hundred parameters"


def flip_last_bit(step: Path) -> None:
    """Damage that a look at names and sizes does not find."""
    file = step / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def failing_to_load(case: Case) -> str:
    with pytest.raises(ValueError) as error:
        load_start(make_engine(case.config()))
    return str(error.value)


def start_and_warnings(case: Case) -> tuple[str | None, list[str]]:
    messages: list[str] = []

    def note(message: str, *args: Any) -> None:
        messages.append(message % args)

    latest_module.log.warning = note  # type: ignore[method-assign, assignment]
    path = load_start(make_engine(case.config()))
    return None if path is None else str(path), messages


def test_each_damage_is_told_once(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    steps = {number: folder / f"step_{number:08d}" for number in (1, 2, 3, 4)}
    for number in (3, 4):
        shutil.copytree(steps[2], steps[number])
    (folder / "latest").write_text("step_00000004 crc32:0\n")
    (steps[3] / "index.json").unlink()
    for number in (2, 4):
        flip_last_bit(steps[number])
    (found, messages), other = run_ranks(2, start_and_warnings, make(tmp_path, train__micro_batch_size=1))
    assert found == other[0] == str(steps[1]) and other[1] == []
    patterns = [
        r".*/latest is damaged; the checkpoint of the highest step counts",
        r"checkpoint step_00000004 cannot be used: .* is damaged: ",
        r"checkpoint step_00000003 cannot be used: .*index\.json is not there",
        rf"falling back to checkpoint {steps[2]}$",
        r"checkpoint step_00000002 cannot be used: .* is damaged: ",
        rf"falling back to checkpoint {steps[1]}$",
    ]
    assert len(messages) == len(patterns), messages
    for pattern, message in zip(patterns, messages, strict=True):
        assert re.match(pattern, message), message

    flip_last_bit(steps[1])
    (message,) = run_ranks(1, failing_to_load, make(tmp_path))
    assert "no checkpoint is whole" in message and message.count(" is damaged: ") == 3
    (message,) = run_ranks(1, failing_to_load, make(tmp_path / "new", checkpoint__load=str(steps[4])))
    assert message.startswith(f"{steps[4]}/rank_00000.safetensors is damaged: ")


def warnings_kept() -> list[str]:
    """What is warned of from now on, in this process."""
    messages: list[str] = []

    def note(message: str, *args: Any) -> None:
        messages.append(message % args)

    saving.logger.warning = note  # type: ignore[method-assign, assignment]
    return messages


def warned(case: Case) -> list[str]:
    messages = warnings_kept()
    start(case)
    return messages


def test_another_seed_is_a_warning(run: Path) -> None:
    assert run_ranks(1, warned, make(run)) == [[]]
    first, second = run_ranks(2, warned, make(run, train__seed=5))
    assert len(first) == 1 and first[0].startswith("train.seed was 1234 and is 5: other samples follow")
    assert second == []


def warned_with_another_tokenizer(case: Case) -> list[str]:
    engine = make_engine(case.config())
    Saver(engine).save(Progress(1, 8, 128, origin={TOKENIZER: "old"}), last=True)
    path, messages = next(find_start(case.config())), warnings_kept()
    assert read_progress(case.config(), path, "new").origin == {TOKENIZER: "new"}
    return messages


def test_another_tokenizer_is_told_once(tmp_path: Path) -> None:
    import_what_ranks_import()
    first, second = run_ranks(2, warned_with_another_tokenizer, make(tmp_path, train__micro_batch_size=1))
    assert len(first) == 1 and "is not the tokenizer that" in first[0] and second == []


def written(case: Case) -> int:
    """Bytes this rank writes after a step; the checkpoint is one that every layout may read."""
    engine = make_engine(case.config())
    train(engine, range(1))
    own = sum(piece.data.numel() for piece in engine.pieces())
    Saver(engine).save(Progress(1, 8, 128), last=True)
    return own


@pytest.mark.parametrize(
    ("case", "most"),
    [
        (Case(data=3, zero=0), 1.001),
        (Case(2, 1, 2, zero=0), 1.001),
        (Case(2, 1, 1, zero=1), 1.001),
        (Case(2, 1, 2, zero=3), 1.15),  # which pads each parameter
    ],
    ids=str,
)
def test_what_ranks_hold_alike_is_written_in_equal_parts(case: Case, most: float, tmp_path: Path) -> None:
    import_what_ranks_import()
    micro = 1 if case.data == 2 else 2
    settings = {"train.output_dir": str(tmp_path), "train.micro_batch_size": micro}
    settings |= {"train.global_batch_size": 6} if case.data == 3 else {}
    case = replace(case, settings=settings)
    world = case.tensor * case.data
    sizes = run_ranks(world, written, case)
    with Reader(resolve(tmp_path)) as reader:
        reader.verify()
        total = 3 * sum(math.prod(reader.shape(name)) for name in reader.names())
    assert sum(sizes) == total
    assert max(sizes) <= most * total / world, sizes
