"""The copy in host memory, beside training: the state stays until it is done, and what fails is heard by all."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import megatron_lite.checkpoint.store as store
from megatron_lite.checkpoint import KINDS, HostCopy, Reader, resolve
from megatron_lite.training import saver as saver_module
from megatron_lite.training.engine import Engine
from megatron_lite.training.saver import Saver
from tests.distributed import run_ranks
from tests.training.saves import failure_of, logged, progress
from tests.training_case import Case, import_what_ranks_import, make_engine, train


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import_what_ranks_import()


def slow_copies(engine: Engine) -> None:
    """From now on the copying begins when an update is due, and leaves it the time to go ahead if it does not wait."""
    begin, due, done = HostCopy.begin, threading.Event(), threading.Event()
    engine.optimizer.register_step_pre_hook(lambda *_: due.set())
    engine.optimizer.register_step_post_hook(lambda *_: done.set())

    def slow(host: HostCopy, pieces: Any) -> Any:
        due.clear()
        done.clear()
        copies, copy = begin(host, pieces)

        def later() -> None:
            assert due.wait(60)
            done.wait(0.3)
            copy()

        return copies, later

    HostCopy.begin = slow  # type: ignore[method-assign]


def held(engine: Engine) -> list[tuple[Any, np.ndarray]]:
    """This rank's pieces as they are: where they belong, and data."""
    found = []
    for p in engine.pieces():
        where = (p.name, p.kind, p.dim, p.start, p.stop, p.flat_start, p.flat_start + p.data.numel())
        assert isinstance(p.data, torch.Tensor)
        found.append((where, p.data.numpy().copy()))
    return found


def train_meanwhile(case: Case) -> tuple[Any, Any]:
    """This rank's pieces when step 1 was saved, and when the weights of step 3 were.

    The copying is slow, and the writing of step 1 begins after step 3.
    """
    engine, write, trained = make_engine(case.config()), store.write_safetensors, threading.Event()

    def afterwards(*args: Any) -> Any:
        assert trained.wait(60)
        return write(*args)

    store.write_safetensors = afterwards
    slow_copies(engine)
    train(engine, range(1))
    first = held(engine)
    with Saver(engine) as saver:
        moving = progress(1)
        saver.save(moving)
        train(engine, range(1, 3))
        moving.step = 3
        trained.set()
        third = held(engine)
        saver.save(moving, full=False, weights=True)
        train(engine, range(3, 4))
    return first, third


OFFLOAD = {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "layout",
    [
        {"zero": 0},
        {"data": 2, "zero": 0, "precision": "bf16"},
        {"data": 2, "zero": 3},
        {"data": 2, "zero": 3, "precision": "bf16", "settings": OFFLOAD},
        {"data": 2, "zero": 2, "settings": OFFLOAD},
        {"data": 2, "zero": 1, "precision": "bf16"},
        {"tensor": 2, "zero": 1, "precision": "bf16"},
        {"pipeline": 2, "data": 2, "zero": 1},
        {"pipeline": 2, "data": 2, "zero": 1, "precision": "bf16"},
    ],
    ids=str,
)
def test_the_state_at_the_call_is_saved(layout: dict[str, Any], tmp_path: Path) -> None:
    settings = {"train.output_dir": str(tmp_path), "checkpoint.weights_precision": "fp32"}
    run = Case(**{**layout, "settings": settings | layout.get("settings", {})})
    found = run_ranks(run.world_size, train_meanwhile, run)
    paths = resolve(tmp_path, checksums=True), tmp_path / "weights" / "step_00000003"
    for path, step, kinds, ranks in zip(
        paths, (1, 3), (KINDS, ("weight",)), zip(*found, strict=True), strict=True
    ):
        with Reader(path) as reader:
            reader.verify()
            assert reader.step == reader.metadata["progress"]["step"] == step
            compared = [piece for pieces in ranks for piece in pieces if piece[0][1] in kinds]
            assert {where[1] for where, _ in compared} == set(kinds)
            for where, data in compared:
                assert (reader.read_flat(*where).numpy() == data).all(), where


def fail_copying(case: Case) -> tuple[str, bool]:
    """Step 2 cannot be copied by the second rank, as is found when the update of step 3 already waits for it; what
    every rank hears, and whether it is known before that. Then step 3 is saved.
    """
    engine, begin, saved = make_engine(case.config()), HostCopy.begin, list[int]()

    def failing(host: HostCopy, pieces: Any) -> Any:
        copies, copy = begin(host, pieces)
        return copies, fault if engine.mesh.rank == 1 and saved == [1] else copy

    def fault() -> None:
        while saver._copying is None or saver._copying._waits_since is None:
            time.sleep(0.001)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    HostCopy.begin = failing  # type: ignore[method-assign]
    with Saver(engine) as saver:
        for step in (1, 2):
            train(engine, range(step - 1, step))
            saver.save(progress(step))
            saved.append(step)
        train(engine, range(2, 3))
        failure = failure_of(saver)
        saver.save(progress(3))
    return failure


def test_a_copy_that_fails_is_an_error_of_its_save_and_no_update_waits_for_it(tmp_path: Path) -> None:
    settings = {"train.output_dir": str(tmp_path), "checkpoint.keep": 0}
    for message, failed in run_ranks(2, fail_copying, Case(data=2, settings=settings), timeout=60):
        assert failed and message == (
            "step 2 was not saved: copying the state to host memory: rank 1 (tensor 0, pipeline 0, data 1): CUDA "
            "error: an illegal memory access was encountered; earlier checkpoints are as they were"
        )
    for step in (1, 3):
        with Reader(tmp_path / "checkpoints" / f"step_{step:08d}") as reader:
            reader.verify()
    assert not (tmp_path / "checkpoints" / "step_00000002").exists()


def wait_for_the_copy(case: Case) -> list[str]:
    """What is logged where the update of the second rank waits 40 s for the copy, by a clock that else stands still."""
    engine, begin, now, messages = make_engine(case.config()), HostCopy.begin, [0.0], logged("info")

    def slow(host: HostCopy, pieces: Any) -> Any:
        copies, copy = begin(host, pieces)

        def later() -> None:
            while saver._copying is None or saver._copying._waits_since is None:
                time.sleep(0.001)
            now[0] += 40.0 * engine.mesh.rank
            copy()

        now[0] += 2.0
        return copies, later

    HostCopy.begin = slow  # type: ignore[method-assign]
    saver_module.time = SimpleNamespace(perf_counter=lambda: now[0])  # type: ignore[attr-defined, assignment]
    with Saver(engine) as saver:
        saver.save(progress(1))
        train(engine, range(2))
    return messages


def test_the_log_counts_the_call_and_the_wait_before_the_update(tmp_path: Path) -> None:
    (message,), others = run_ranks(
        2, wait_for_the_copy, Case(data=2, settings={"train.output_dir": str(tmp_path)}), timeout=60
    )
    assert message.endswith(", training waited 42.00 s") and others == []


def end_while_copying(case: Case) -> None:
    """Training fails, and the end of its `with` block comes before the copy's."""
    engine, begin = make_engine(case.config()), HostCopy.begin

    def slow(host: HostCopy, pieces: Any) -> Any:
        copies, copy = begin(host, pieces)
        return copies, lambda: (time.sleep(0.3), copy())

    HostCopy.begin = slow  # type: ignore[method-assign]
    train(engine, range(1))
    with pytest.raises(ZeroDivisionError), Saver(engine) as saver:
        saver.save(progress(1))
        raise ZeroDivisionError


def test_an_end_by_an_error_waits_for_the_copy(tmp_path: Path) -> None:
    run_ranks(1, end_while_copying, Case(settings={"train.output_dir": str(tmp_path)}))
    with Reader(resolve(tmp_path)) as reader:
        reader.verify()


def refused_on_one(case: Case, error: Exception) -> tuple[list[str], list[bool]]:
    """The second rank gets no memory for a copy of step 2; what is said, and which saves were beside training."""
    engine, messages, begin, background = make_engine(case.config()), logged("warning"), HostCopy.begin, []

    def refused(host: HostCopy, pieces: Any) -> Any:
        if len(background) == 1 and engine.mesh.rank == 1:
            raise error
        return begin(host, pieces)

    HostCopy.begin = refused  # type: ignore[method-assign]
    train(engine, range(1))
    with Saver(engine) as saver:
        for step in (1, 2, 3):
            saver.save(progress(step))
            background.append(saver._thread is not None)
            train(engine, range(step, step + 1))
    return messages, background


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")], ids=repr)
def test_where_one_rank_has_no_memory_for_a_copy_all_wait(error: Exception, tmp_path: Path) -> None:
    settings = {"train.output_dir": str(tmp_path), "checkpoint.keep": 0}
    first, second = run_ranks(2, refused_on_one, Case(data=2, settings=settings), error)
    assert first[1] == second[1] == [True, False, True]
    (message,) = first[0]
    reason = "[Errno 12] Cannot allocate memory" if isinstance(error, OSError) else "MemoryError"
    assert f"(rank 1 (tensor 0, pipeline 0, data 1): {reason}): training waits for this save" in message
    assert second[0] == []
    for step in (1, 2, 3):
        with Reader(tmp_path / "checkpoints" / f"step_{step:08d}") as reader:
            reader.verify()
            assert reader.step == step
