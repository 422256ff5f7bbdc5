"""Saving beside training, on ranks: what is saved is the state at the call, and what fails is heard by all."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_lite.checkpoint.store as store
from megatron_lite.checkpoint import CheckpointError, Reader, find_latest, resolve
from megatron_lite.training import saver as saver_module
from megatron_lite.training.saver import Saver
from megatron_lite.training.saving import Progress
from tests.distributed import RankFailed, run_ranks
from tests.training_case import Case, import_what_ranks_import, make_engine, train


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import_what_ranks_import()


def case(folder: Path, **layout: Any) -> Case:
    return Case(**layout, settings={"train.output_dir": str(folder)})


def progress(step: int) -> Progress:
    return Progress(step, step * 8, step * 128)


def train_meanwhile(case: Case) -> list[tuple[Any, np.ndarray]]:
    """This rank's pieces when step 1 was saved: where they belong, and data. The writing begins after step 2."""
    engine, write, trained = make_engine(case.config()), store.write_safetensors, threading.Event()

    def afterwards(*args: Any) -> Any:
        assert trained.wait(60)
        return write(*args)

    store.write_safetensors = afterwards
    train(engine, range(1))
    expected = []
    for p in engine.pieces():
        where = (p.name, p.kind, p.dim, p.start, p.stop, p.flat_start, p.flat_start + p.data.numel())
        expected.append((where, p.data.numpy().copy()))
    with Saver(engine) as saver:
        moving = progress(1)
        saver.save(moving)
        train(engine, range(1, 2))
        moving.step = 2
        trained.set()
    return expected


@pytest.mark.parametrize("layout", [{"zero": 0}, {"data": 2, "zero": 3}, {"tensor": 2, "zero": 1}], ids=str)
def test_the_state_at_the_call_is_saved(layout: dict[str, int], tmp_path: Path) -> None:
    expected = run_ranks(
        layout.get("data", 1) * layout.get("tensor", 1), train_meanwhile, case(tmp_path, **layout)
    )
    with Reader(resolve(tmp_path, checksums=True)) as reader:
        assert reader.step == reader.metadata["progress"]["step"] == 1
        for where, data in [piece for pieces in expected for piece in pieces]:
            assert (reader.read_flat(*where).numpy() == data).all(), where


def fail_on_one(case: Case) -> tuple[str, bool]:
    """Step 2 cannot be written by the second rank; what every rank hears, and whether step 3 was saved."""
    engine, write = make_engine(case.config()), store.write_safetensors

    def full(path: Path, *args: Any) -> Any:
        if path.parts[-2:] == ("step_00000002.tmp", "rank_00001.safetensors"):
            raise OSError(28, "No space left on device")
        return write(path, *args)

    store.write_safetensors = full
    train(engine, range(1))
    with Saver(engine) as saver:
        saver.save(progress(1))
        saver.save(progress(2))
        assert saver._thread is not None
        saver._thread.join(60)
        failed = saver.failed
        with pytest.raises(CheckpointError) as error:
            saver.wait()
        saver.save(progress(3))
    return str(error.value), failed


def test_what_fails_on_one_rank_is_heard_by_all_and_the_next_save_is_whole(tmp_path: Path) -> None:
    for message, failed in run_ranks(2, fail_on_one, case(tmp_path, data=2)):
        assert failed and "step_00000002 was not saved: writing the pieces: rank 1: [Errno 28]" in message
    found = find_latest(tmp_path, checksums=True)
    assert found is not None and found.name == "step_00000003"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000001", "step_00000003"]


def die_writing(case: Case) -> None:
    engine, write = make_engine(case.config()), store.write_safetensors

    def die(path: Path, *args: Any) -> Any:
        if path.parts[-2:] == ("step_00000002.tmp", "rank_00001.safetensors"):
            os._exit(9)
        return write(path, *args)

    store.write_safetensors = die
    train(engine, range(1))
    with Saver(engine) as saver:
        saver.save(progress(1))
        saver.save(progress(2))


def test_a_rank_that_dies_in_the_background_leaves_what_was_saved(tmp_path: Path) -> None:
    with pytest.raises(RankFailed):
        run_ranks(2, die_writing, case(tmp_path, data=2))
    found = find_latest(tmp_path, checksums=True)
    assert found is not None and found.name == "step_00000001"


def without_room(case: Case) -> tuple[list[str], bool]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    saver_module.logger.addHandler(handler)
    saver_module.available_bytes = lambda: 1000  # type: ignore[attr-defined]
    engine = make_engine(case.config())
    train(engine, range(1))
    with Saver(engine) as saver:
        saver.save(progress(1))
        return messages, saver._thread is None and find_latest(case.settings["train.output_dir"]) is not None


def test_where_memory_is_short_training_waits(tmp_path: Path) -> None:
    first, second = run_ranks(2, without_room, case(tmp_path, data=2))
    assert first[1] and second[1]
    (message,) = (text for text in first[0] if "training will wait for each save" in text)
    assert "a copy of the state takes 0.0 GiB on " in message
    assert second[0] == []
