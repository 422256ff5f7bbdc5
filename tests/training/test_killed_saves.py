"""kill -9 at random moments of saving: what was reported as saved is there, whole, and the run goes on from it."""

import logging
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import KINDS, Piece, Reader, find_latest
from megatron_lite.config import Config
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.engine import Engine
from megatron_lite.training.metrics import Metrics
from megatron_lite.training.saver import WEIGHTS_FOLDER, Saver
from megatron_lite.training.saving import Progress
from tests.command_line import repeatable, run_command, words, write_bytes
from tests.distributed import RankFailed, run_ranks
from tests.training_case import Case

KILLS = 50
SHAPE = (4, 200, 100)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead process wrote stays without fsync; that it is there for power cuts, tests of the store show."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def kill_this_process_in(seconds: float) -> None:
    """By a process of its own, which no lock of this one delays."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(victim, signal.SIGKILL)
        os._exit(0)


def report_to(log: Path) -> None:
    logging.root.handlers = [logging.FileHandler(log)]


def reported(log: Path) -> int:
    """The last step that the log says was saved."""
    return max((int(step) for step in re.findall(r"step (\d+) \| saved", log.read_text())), default=0)


def newest(output: Path) -> int:
    """The step that a run would go on from, all of it checked; 0 where nothing was ever saved."""
    found = find_latest(output, checksums=True)
    if found is None:
        return 0
    with Reader(found) as reader:
        return reader.step


def check_weights(output: Path) -> int:
    """Every folder of weights alone that has its name is whole, and of its step; how many there are."""
    folders = list((output / WEIGHTS_FOLDER).glob("step_????????"))
    for folder in folders:
        with Reader(folder) as reader:
            reader.verify()
            step = torch.tensor(float(folder.name.removeprefix("step_"))).bfloat16()
            assert reader.kinds == ["weight"] and (reader.read("number") == step).all(), folder
    return len(folders)


class Numbers:
    """Stands for an engine and its optimizer: all of its state is the number of its step, of which each rank holds a
    part.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.mesh = config, Mesh(dist.get_rank(), tensor_size=dist.get_world_size())
        self.start, self.stop = self.mesh.shard(SHAPE[0])
        self.data = {kind: torch.zeros(SHAPE[1] * SHAPE[2] * (self.stop - self.start)) for kind in KINDS}
        self.optimizer, self.hooks = self, list[Callable[[], None]]()

    def register_step_pre_hook(self, hook: Callable[[], None]) -> Any:
        self.hooks.append(hook)
        return SimpleNamespace(remove=self.hooks.clear)

    def train_step(self, step: int) -> None:
        for hook in self.hooks:
            hook()
        for data in self.data.values():
            data.fill_(step)

    def pieces(self) -> list[Piece]:
        where = (SHAPE, 0, self.start, self.stop, 0)
        return [Piece("number", kind, *where, data) for kind, data in self.data.items()]

    def state(self) -> dict[str, Any]:
        return {}


def save_until_killed(case: Case, log: Path, begin: int, victim: int, when: float) -> None:
    """`when` is in saves; how long one takes is known from the first."""
    logging.getLogger("megatron_lite").setLevel("INFO" if dist.get_rank() == 0 else "ERROR")
    report_to(log)
    engine = Numbers(case.config())
    with Saver(cast(Engine, engine)) as saver:
        for step in range(begin + 1, begin + 10_000):
            engine.train_step(step)
            if step == begin + 1:
                start = time.perf_counter()
            elif step == begin + 2 and dist.get_rank() == victim:
                kill_this_process_in(when * (time.perf_counter() - start))
            saver.save(Progress(step), weights=step % 2 == 0)
            if step == begin + 1:
                saver.wait()


def test_kill_at_any_moment_of_saving(tmp_path: Path) -> None:
    """One rank and two, beside training and not; of two ranks one is killed, as when a node is lost."""
    rng, log, newer = random.Random(3), tmp_path / "log", Counter[str]()
    log.touch()
    for kill in range(KILLS):
        background, ranks = bool(kill % 2), 1 + kill // 2 % 2
        case = Case(settings={"train.output_dir": str(tmp_path), "checkpoint.async_save": background})
        before = newest(tmp_path)
        with pytest.raises(RankFailed, match=r"died|Connection|peer|Gloo|gloo"):
            run_ranks(ranks, save_until_killed, case, log, before, rng.randrange(ranks), rng.uniform(0, 3))
        found = newest(tmp_path)
        assert found >= reported(log), f"kill {kill}"
        if found:
            with Reader(find_latest(tmp_path)) as reader:
                for kind in KINDS:
                    assert (reader.read("number", kind) == found).all(), f"kill {kill}: of another step"
        newer["weights"] = check_weights(tmp_path)
        newer["half written weights"] += bool(list((tmp_path / WEIGHTS_FOLDER).glob("*.tmp")))
        newer["none" if found == before else "some"] += 1
        newer["half written"] += bool(list((tmp_path / "checkpoints").glob("*.tmp")))
    assert newer["some"] > KILLS / 2 and newer["half written"] > KILLS / 5, newer
    assert newer["weights"] > KILLS / 5 and newer["half written weights"], newer


def test_killed_runs_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """pretrain_gpt.py killed three times while it trains and saves."""
    prefix, rng = write_bytes(tmp_path), random.Random(4)
    common = ("train.steps=12", "checkpoint.interval=1")
    (whole,) = run_command(words(prefix, tmp_path / "whole", *common))
    assert whole.status == 0
    output, log = tmp_path / "killed", tmp_path / "log"
    log.touch()
    arguments = words(prefix, output, *common, "train.micro_batch_size=1")
    for ranks in (1, 2, 1):
        step, seconds = newest(output) + rng.randint(1, 3), rng.uniform(0.0, 0.03)
        with pytest.raises(RankFailed):
            run_command(arguments, ranks, first=lambda: _dies_after(step, seconds, log))  # noqa: B023
        assert reported(log) <= newest(output) < 12
    assert [result.status for result in run_command(arguments)] == [0]
    assert newest(output) == 12
    for row, other in zip(repeatable(output), repeatable(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=2e-6)
        assert (row["step"], row["tokens"]) == (other["step"], other["tokens"])


def _dies_after(step: int, seconds: float, log: Path) -> None:
    report_to(log)
    report = Metrics.end_step

    def end_step(self: Metrics, done: int, *rest: Any) -> None:
        report(self, done, *rest)
        if done == step:
            kill_this_process_in(seconds)

    Metrics.end_step = end_step  # type: ignore[method-assign]
