"""What the benchmarks share: sides that wait in processes of their own, statistics pair by pair, tables.

Timing on a shared machine drifts by more than the differences looked for. So all sides of a comparison are built
first and then take turns, a few steps each, round after round; a ratio is taken within a round and the median over
the rounds is what is reported. Each side has its own processes, so that peak memory is its own.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_lite.config import Config, ConfigError, load_config
from megatron_lite.data.loader import Batch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP_STEPS = 2

# A fresh process forked from a clean server: it has no thread pool and no CUDA context of its parent.
_PROCESSES = multiprocessing.get_context("forkserver")

Step = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: its row in the table.
        build: `build(rank, store, *args)` gives what does one training step; called in a process of its own.
            `store` is a path for the ranks to find each other.
        ranks: number of such processes.
    """

    name: str
    build: Callable[..., Step]
    args: tuple[Any, ...]
    device: str
    ranks: int = 1


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
        torch.set_num_threads(max(1, threads() // side.ranks))
        step = side.build(rank, store, *side.args)
        for _ in range(WARMUP_STEPS):
            step()
        pipe.send((True, None))
        while steps := pipe.recv():
            if side.ranks > 1:
                dist.barrier()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            if side.device == "cuda":
                torch.cuda.synchronize()
            pipe.send((True, time.perf_counter() - started))
        pipe.send((True, _peak(side.device)))
        pipe.recv()  # held until the team is stopped: no rank leaves while a peer still talks to it
    except EOFError:
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))


def _peak(device: str) -> float:
    """Peak so far, in MiB: allocated on the GPU, or resident on the CPU.

    Not getrusage: its ru_maxrss starts from the size of the process that this one was started by.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def threads() -> int:
    """Threads of a side with one rank; more ranks share them. The rule of a training run."""
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else len(os.sched_getaffinity(0))


def take_turns(sides: Sequence[Side], rounds: int, steps: int) -> tuple[list[list[float]], list[float]]:
    """Seconds a step, [side][round], every side once a round; and each side's peak memory in MiB."""
    teams: list[Team] = []
    try:
        for side in sides:
            print(f"building {side.name}", file=sys.stderr)
            teams.append(Team(side))
        seconds: list[list[float]] = [[] for _ in teams]
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for times, team in zip(seconds, teams, strict=True):
                times.append(team.seconds(steps) / steps)
        return seconds, [team.finish() for team in teams]
    finally:
        for team in teams:
            team.stop()


def engine_step(rank: int, store: str, config: Config, ranks: int, device_name: str) -> Step:
    """One training step of ours on this rank: what a training run builds, on one fixed global batch."""
    from megatron_lite.parallel.launch import Launch, choose_device, init_distributed

    launch = Launch(rank=rank, world_size=ranks, local_rank=rank, local_size=ranks)
    device = choose_device(device_name, launch)  # before DeepSpeed is imported, which then knows of it

    from megatron_lite.model.runtime import Runtime
    from megatron_lite.ops import build_ops
    from megatron_lite.parallel.mesh import build_mesh
    from megatron_lite.training.allocator import set_cpu_allocator
    from megatron_lite.training.engine import build_engine

    if device.type == "cpu" and config.kernels.cpu_allocator:
        set_cpu_allocator()
    if ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        meeting = dist.FileStore(store, ranks)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=ranks)
    init_distributed(launch, device, timeout_minutes=5)
    parallel, train = config.parallel, config.train
    mesh = build_mesh(parallel.tensor, parallel.pipeline, parallel.sequence_parallel)
    runtime = Runtime(
        mesh=mesh,
        ops=build_ops(config.kernels),
        dtype=DTYPES[train.precision],
        device=device,
        seed=train.seed,
        recompute=train.recompute,
    )
    engine = build_engine(config, runtime)
    tokens, labels = global_batch(config)
    size = train.micro_batch_size
    starts = range(mesh.data_rank * size, len(tokens), mesh.data_size * size)
    rows = [slice(start, start + size) for start in starts]
    batches = [
        Batch(tokens[row], labels[row], np.ones(labels[row].shape, np.float32), None, None) for row in rows
    ]
    return lambda: engine.train_step(batches, 0)


def global_batch(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels, each [global batch, s] int64, random: their values do not change the work."""
    assert config.model.vocab_size is not None
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def parser(doc: str, rounds: int, steps: int) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", default=str(ROOT / "configs/shakespeare_char.json"), help="%(default)s")
    made.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    made.add_argument("--rounds", type=int, default=rounds, help="turns of every side (%(default)s)")
    made.add_argument("--steps", type=int, default=steps, help="steps a turn (%(default)s)")
    return made


def read_config(options: argparse.Namespace, *overrides: str) -> Config:
    """The configuration with the benchmark's own overrides, then the user's. Ends the program if it is wrong."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device on this machine")
    try:
        return load_config(options.config, [*overrides, *options.overrides])
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def header(options: argparse.Namespace, config: Config) -> str:
    """When, where and on what the figures below were measured."""
    model, train = config.model, config.train
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    device = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    lines = [
        f"date: {datetime.date.today()}",
        f"machine: {device}, {os.cpu_count()} CPU cores, {threads()} threads for a side",
        f"versions: python {platform.python_version()}, {versions}",
        f"model: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"vocabulary {model.padded_vocab_size}, dropout {model.hidden_dropout:g}",
        f"batch: {train.global_batch_size} x {model.seq_length} tokens in micro-batches of {train.micro_batch_size}",
        f"turns: {options.rounds} rounds of {options.steps} steps a side, alternating; medians, (least - most)",
        f"command: python {shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _processor() -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range of some measurements."""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} - {high})"


def table(
    sides: Sequence[Side], tokens: int, seconds: list[list[float]], peaks: list[float], baseline: int
) -> str:
    """A Markdown table of the sides; ratios are to side number `baseline`, taken within each round."""
    ranked = any(side.ranks > 1 for side in sides)
    columns = (
        "side",
        "tokens/s",
        f"speed / {sides[baseline].name}",
        "peak MiB of a rank" if ranked else "peak MiB",
    )
    rows = [columns, tuple("---" for _ in columns)]
    for side, times, peak in zip(sides, seconds, peaks, strict=True):
        ratios = [base / own for base, own in zip(seconds[baseline], times, strict=True)]
        rows.append((side.name, spread([tokens / own for own in times], 0), spread(ratios, 3), f"{peak:.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
