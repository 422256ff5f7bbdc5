"""Sides of a comparison that wait in processes of their own and take turns.

Timing on a shared machine drifts by more than the differences looked for. So all sides of a comparison are built
first and then take turns, a few steps each, round after round; a ratio is taken within a round and the median over
the rounds is what is reported. Each side has its own processes, so that peak memory is its own.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WARMUP_STEPS = 2

# A fresh process forked from a clean server: it has no thread pool and no CUDA context of its parent.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch"])

Step = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: its row in the table.
        build: `build(rank, store, *args)` gives what does one training step; called in a process of its own.
            `store` is a path for the ranks to find each other.
        ranks: number of such processes, which share `threads`.
    """

    name: str
    build: Callable[..., Step]
    args: tuple[Any, ...]
    device: str
    threads: int
    ranks: int = 1


@dataclass
class Result:
    """What a side did: seconds a step by round and peak memory in MiB, or why there is nothing."""

    side: Side
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    error: str = ""


class Team:
    """The processes of one side: built, warmed up, then waiting for their turn.

    Raises:
        RuntimeError: a process failed; the message holds its traceback.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(side.ranks):
            mine, theirs = _PROCESSES.Pipe()
            process = _PROCESSES.Process(
                target=_serve, args=(theirs, side, rank, f"{self._folder.name}/store"), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._receive()

    def seconds(self, steps: int) -> float:
        """Wall time of `steps` training steps, of the slowest rank."""
        self._send(steps)
        return max(self._receive())

    def finish(self) -> float:
        """Ends the processes, and gives the peak memory in MiB of the rank that needed most."""
        self._send(0)
        peak = max(self._receive())
        self.stop()
        return peak

    def stop(self) -> None:
        """Ends the processes whatever they do."""
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()

    def _send(self, steps: int) -> None:
        for pipe in self._pipes:
            pipe.send(steps)

    def _receive(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                ok, answer = pipe.recv()
            except EOFError:
                ok, answer = False, "it died"
            if not ok:
                self.stop()
                raise RuntimeError(f"{self.side.name}, rank {rank}: {answer}")
            answers.append(answer)
        return answers


def _serve(pipe: Connection, side: Side, rank: int, store: str) -> None:
    """A process of a team: builds its side, then does as many steps as it is told, until told 0."""
    os.dup2(2, 1)  # DeepSpeed prints; the benchmark's own output is its tables
    try:
        torch.set_num_threads(max(1, side.threads // side.ranks))
        step = side.build(rank, store, *side.args)
        torch.set_num_threads(max(1, side.threads // side.ranks))  # choosing a device sets them, too
        for _ in range(WARMUP_STEPS):
            step()
        pipe.send((True, None))
        while steps := pipe.recv():
            if side.ranks > 1:
                dist.barrier()
            _wait(side.device)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            _wait(side.device)
            pipe.send((True, time.perf_counter() - started))
        pipe.send((True, _peak(side.device)))
        pipe.recv()  # held until the team is stopped: no rank leaves while a peer still talks to it
    except EOFError:
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str) -> float:
    """Peak so far, in MiB: allocated on the GPU, or resident on the CPU.

    Not getrusage: its ru_maxrss starts from the size of the process that this one was started by.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def take_turns(sides: Sequence[Side], rounds: int, steps: int) -> list[Result]:
    """Every side once a round.

    Raises:
        RuntimeError: a side failed.
    """
    teams: list[Team] = []
    try:
        for side in sides:
            print(f"building {side.name}", file=sys.stderr)
            teams.append(Team(side))
        results = [Result(side) for side in sides]
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for result, team in zip(results, teams, strict=True):
                result.seconds.append(team.seconds(steps) / steps)
        for result, team in zip(results, teams, strict=True):
            result.peak = team.finish()
        return results
    finally:
        for team in teams:
            team.stop()


def one_by_one(sides: Sequence[Side], rounds: int, steps: int, deadline: float) -> list[Result]:
    """For a GPU, whose memory they could not share: a side does all its rounds before the next is built.

    A side that fails (for want of memory, say) has the last line of its error in place of figures, and so has one
    that `deadline` (of time.time) left no time for.
    """
    results = []
    for side in sides:
        result = Result(side)
        results.append(result)
        if time.time() > deadline:
            result.error = "left out, the time being up"
            continue
        print(f"building {side.name}", file=sys.stderr)
        try:
            team = Team(side)
            try:
                result.seconds = [team.seconds(steps) / steps for _ in range(rounds)]
                result.peak = team.finish()
                print(f"{min(result.seconds):.4f} s a step at best, {result.peak:.0f} MiB", file=sys.stderr)
            finally:
                team.stop()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            result.error = str(error).strip().splitlines()[-1][:200]
    return results
