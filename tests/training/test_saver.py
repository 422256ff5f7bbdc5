"""Saving beside training, on ranks: what is saved is the state at the call, and what fails is heard by all."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_lite.checkpoint.store as store
from megatron_lite.checkpoint import CheckpointError, Reader, find_latest, resolve
from megatron_lite.training import saver as saver_module
from megatron_lite.training.loop import _failed_saves_end_the_run
from megatron_lite.training.resilience import RunFailed
from megatron_lite.training.saver import RankLost, Saver, without_room
from megatron_lite.training.saving import gather
from tests.distributed import RankFailed, run_ranks
from tests.training.saves import failure_of, logged, progress
from tests.training_case import Case, import_what_ranks_import, make_engine, train


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import_what_ranks_import()


def case(folder: Path, **layout: Any) -> Case:
    return Case(**layout, settings={"train.output_dir": str(folder)})


def reduce_meanwhile(case: Case) -> None:
    """Collectives of training on one rank before, on the other while its thread waits for the first one's."""
    engine, write = make_engine(case.config()), store.write_safetensors
    written, reduced, second = threading.Event(), threading.Event(), engine.mesh.rank == 1

    def slow(*args: Any) -> Any:
        assert second or reduced.wait(60)
        result = write(*args)
        written.set()
        return result

    store.write_safetensors = slow
    with Saver(engine) as saver:
        saver.save(progress(1))
        if second:
            assert written.wait(60)
            time.sleep(0.2)
        for number in range(20):
            value = torch.full((3,), float(number))
            dist.all_reduce(value)
            assert value.tolist() == [2 * number] * 3
        reduced.set()


def test_nothing_of_a_save_meets_trainings_collectives(tmp_path: Path) -> None:
    run_ranks(2, reduce_meanwhile, case(tmp_path, data=2), timeout=60)
    with Reader(resolve(tmp_path)) as reader:
        reader.verify()


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
        failure = failure_of(saver)
        saver.save(progress(3))
    return failure


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


def close_connections() -> None:
    """All of this process to others, as its death would; what listens stays, and pipes."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                connection.shutdown(socket.SHUT_RDWR)


def lose_touch(case: Case) -> tuple[str, bool]:
    """The second rank's connections are closed while it writes step 2, as by its death; what each is told of it."""
    engine, write = make_engine(case.config()), store.write_safetensors

    def cut(path: Path, *args: Any) -> Any:
        if path.parts[-2:] == ("step_00000002.tmp", "rank_00001.safetensors"):
            close_connections()
        return write(path, *args)

    store.write_safetensors = cut
    train(engine, range(1))
    with pytest.raises(RunFailed) as error, _failed_saves_end_the_run(), Saver(engine) as saver:
        saver.save(progress(1))
        saver.save(progress(2))
        with pytest.raises(RankLost):
            saver.wait()
        saver.save(progress(3), last=True)
    return str(error.value), error.value.shared


def test_the_others_are_told_of_a_rank_that_dies(tmp_path: Path) -> None:
    for message, shared in run_ranks(2, lose_touch, case(tmp_path, data=2)):
        assert message.startswith(
            "a save was not finished: another rank died meanwhile, or could not be reached ("
        )
        assert not shared, "the rank that would speak for all may be the dead one"
    found = find_latest(tmp_path, checksums=True)
    assert found is not None and found.name == "step_00000001"


def end_with_an_error(case: Case) -> None:
    engine = make_engine(case.config())

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    store.write_safetensors = full
    with pytest.raises(CheckpointError, match="step_00000001 was not saved"), Saver(engine) as saver:
        saver.save(progress(1))
    with pytest.raises(ZeroDivisionError), Saver(engine) as saver:
        saver.save(progress(1))
        raise ZeroDivisionError
    assert not engine.optimizer._optimizer_step_pre_hooks, "an update after the end has nothing to wait for"


def test_the_end_raises_what_failed_in_the_background_but_not_for_what_ended_the_run(tmp_path: Path) -> None:
    run_ranks(1, end_with_an_error, case(tmp_path))


def save_with_room(case: Case, missing: int) -> tuple[list[str], bool]:
    """Saves where twice what all ranks hold is free, but for some bytes."""
    engine, messages = make_engine(case.config()), logged("warning")
    train(engine, range(1))
    held = sum(gather(sum(piece.data.nbytes for piece in engine.pieces())))  # type: ignore[union-attr]
    saver_module.available_bytes = lambda: 2 * held - missing  # type: ignore[attr-defined]
    with Saver(engine) as saver:
        saver.save(progress(1))
        background = saver._thread is not None
    return messages, background


def test_where_memory_is_short_training_waits(tmp_path: Path) -> None:
    assert run_ranks(2, save_with_room, case(tmp_path, data=2), 0) == [([], True)] * 2
    first, second = run_ranks(2, save_with_room, case(tmp_path / "short", data=2), 1)
    (message,) = first[0]
    assert (
        "a copy of the state takes 0.0 GiB on " in message and "training will wait for each save" in message
    )
    assert second[0] == [] and not first[1] and not second[1]
    assert find_latest(tmp_path / "short") is not None


@pytest.mark.parametrize(
    ("ranks", "short"),
    [
        ([("a", 5, 10)], None),
        ([("a", 5, 9)], ("a", 5, 9)),
        ([("a", 2, 10), ("a", 3, 10)], None),
        ([("a", 3, 11), ("b", 6, 12), ("a", 3, 11)], ("a", 6, 11)),
        ([("a", 3, 6), ("b", 3, 5), ("c", 3, 1)], ("b", 3, 5)),
        ([("a", 3, 12), ("a", 3, 11)], ("a", 6, 11)),
        ([("a", 3, None), ("b", 3, None)], None),
        ([("a", 3, None), ("a", 3, 11)], ("a", 6, 11)),
        ([("a", 0, 0)], None),
    ],
)
def test_room_is_reckoned_by_node(ranks: list[tuple[str, int, int | None]], short: Any) -> None:
    assert without_room(ranks) == short
