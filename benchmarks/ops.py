"""Every operation of the seam, forward and backward: plain PyTorch, the same under torch.compile, and ours.

Ours is what `auto` chooses here; the column `backend` names it. Sides take turns, a few calls each, round after round;
ratios are taken within a round. A CPU is timed by the clock under our allocator setting for every side, a GPU by CUDA
events, with the cache emptied before each call. Memory is what a call needs at its peak beside its inputs: on a GPU by
torch's allocator; on a CPU the growth of resident memory, in a process of its own that gives every freed block of
64 KiB or more back to the system, so that buffers outside torch are counted, too. `roof` is the least time the
operation could take (bytes over the copy bandwidth, or operations over the rate of a matrix product, both measured in
this run) over the time it took; where tensors stay in the cache it may exceed 100%.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cases import SIZES, Case, Cases, relative_error
from common import header, parse, parser, spread
from roof import copy_bandwidth, gemm_rate
from torch import Tensor

from megatron_lite.training.allocator import set_cpu_allocator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}  # of the relative error, ours against plain in fp32
PLAIN, COMPILED, OURS = "plain", "compile", "ours"
TURN_SECONDS = 0.03


class Side:
    """One way to compute a case, with inputs of its own; calling it does forward and backward."""

    def __init__(self, name: str, function: Callable[..., Any], leaves: Sequence[Tensor]) -> None:
        self.name, self.function = name, function
        self.leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        self.grads: list[Tensor] = []

    def forward(self) -> tuple[Tensor, ...]:
        found = self.function(*self.leaves)
        return found if isinstance(found, tuple) else (found,)

    def __call__(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = self.forward()
        return outputs, torch.autograd.grad(outputs, self.leaves, self.grads)


def make_sides(case: Case, compiled: bool) -> tuple[list[Side], dict[str, str]]:
    """The sides that work, warmed up, after a check of our values; and why others do not."""
    leaves = case.plain_leaves or case.leaves
    plain = Side(PLAIN, case.plain, leaves)
    sides = [plain, Side(OURS, case.ours, case.leaves)]
    if compiled:
        torch._dynamo.reset()
        sides.insert(1, Side(COMPILED, torch.compile(case.plain, dynamic=False), leaves))
    sides += [Side(name, call, leaves) for name, call in case.others.items()]
    torch.manual_seed(1)
    plain.grads = [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in plain.forward()]
    works, broken = [], {}
    for side in sides:
        # Some of Liger's kernels overwrite what they are given.
        side.grads = [grad.clone() for grad in plain.grads] if side.name in case.others else plain.grads
        try:
            found = side()
            if side.name == OURS and not case.random:
                check(case, found, plain.grads)
            del found
            side()
            works.append(side)
        except Exception as error:
            if side.name in (PLAIN, OURS):
                raise
            broken[side.name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return works, broken


def check(case: Case, found: Any, upstream: Sequence[Tensor]) -> None:
    """Raises ValueError where outputs or gradients are wrong: the time of a wrong result says nothing.

    They are compared with the plain way in fp32 on the same numbers.
    """
    exact = Side(PLAIN, case.plain, [leaf.float() for leaf in case.plain_leaves or case.leaves])
    exact.grads = [grad.float() for grad in upstream]
    (outputs, grads), (plain_outputs, plain_grads) = found, exact()
    if len(plain_grads) > len(grads):  # gate and up
        plain_grads = (torch.cat(plain_grads, dim=-1),)
    bound = BOUNDS[next(name for name, dtype in DTYPES.items() if dtype == case.leaves[0].dtype)]
    for number, (a, b) in enumerate(zip((*outputs, *grads), (*plain_outputs, *plain_grads), strict=True)):
        error = relative_error(a, b)
        if not error < bound:
            kind = "output" if number < len(outputs) else "gradient"
            raise ValueError(
                f"{case.name}, {case.shape}: {kind} {number} is off by {error:.1e}, over {bound:g}"
            )


# ------------------------------------------------------------------------------------------- time


def take_turns(sides: list[Side], rounds: int, device: str) -> list[list[float]]:
    """Seconds a call, [side][round]."""
    turn = cuda_turn if device == "cuda" else cpu_turn
    calls = [max(1, min(50, int(TURN_SECONDS / turn(side, 1)))) for side in sides]
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for times, side, count in zip(found, sides, calls, strict=True):
            times.append(turn(side, count))
    return found


def cpu_turn(side: Side, calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        side()
    return (time.perf_counter() - begun) / calls


def cuda_turn(side: Side, calls: int) -> float:
    """Median of the calls; the GPU sleeps first, so that the CPU is ahead of it and launches cost nothing."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda._sleep(2_000_000 * min(calls, 10))  # about a millisecond each
    for start, end in events:
        flush.zero_()
        start.record()
        side()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


# ----------------------------------------------------------------------------------------- memory


def cuda_memory(sides: list[Side]) -> dict[str, float]:
    """Peak MiB of each side beside what it holds between calls."""
    found = {}
    for side in sides:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        side()
        found[side.name] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return found


def cpu_memory(size: str, number: int, dtype: str, name: str, compiled: bool) -> dict[str, float]:
    """The same on a CPU; runs in a process of its own."""
    torch.manual_seed(0)
    cases = Cases(SIZES[size][number], DTYPES[dtype], "cpu", others=False)
    sides, _ = make_sides(cases.makers[name](), compiled)
    found = {}
    for side in sides:
        gc.collect()
        held = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
        side()
        found[side.name] = max(0, _resident("VmHWM") - held) / 2**10
    return found


def _resident(key: str) -> int:
    """KiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def start_memory_process(count: int) -> None:
    os.dup2(2, 1)
    torch.set_num_threads(count)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(
            -3, 2**16
        )  # M_MMAP_THRESHOLD: such blocks are mapped and unmapped one by one


# ------------------------------------------------------------------------------------------ table

COLUMNS = (
    "operation | shape | backend | plain ms | compile ms | ours ms | plain / ours | compile / ours | "
    "MiB plain | compile | ours | roof"
)


def ratio(over: list[float], under: list[float]) -> str:
    return spread([a / b for a, b in zip(over, under, strict=True)], 2)


def row(case: Case, times: dict[str, list[float]], memory: dict[str, float], least: float) -> str:
    def milliseconds(name: str) -> str:
        return spread([1e3 * t for t in times[name]], 2) if name in times else "-"

    ours = times[OURS]
    cells = [case.name, case.shape, case.backend, *(milliseconds(name) for name in (PLAIN, COMPILED, OURS))]
    cells += [ratio(times[name], ours) if name in times else "-" for name in (PLAIN, COMPILED)]
    cells += [f"{memory[name]:.1f}" if name in memory else "-" for name in (PLAIN, COMPILED, OURS)]
    return f"| {' | '.join(cells)} | {least / statistics.median(ours):.0%} |"


class Run:
    """The whole benchmark: one table a type, and what else is to be said after it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.bandwidth = copy_bandwidth(self.device)
        self.others: list[str] = []
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.wrong = False
        self.pool = None
        if self.device == "cpu" and Path("/proc/self/clear_refs").exists():
            self.pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("forkserver"), start_memory_process, (torch.get_num_threads(),)
            )

    def table(self, dtype: str) -> None:
        """Prints the rows of one type as they are found."""
        rate = gemm_rate(DTYPES[dtype], self.device)
        print(f"\n#### {dtype}\n\nRoofs: {self.bandwidth / 1e9:.1f} GB/s, {rate / 1e12:.2f} TFLOP/s.\n")
        print(f"| {COLUMNS} |\n|{' --- |' * len(COLUMNS.split(' | '))}", flush=True)
        sizes = self.options.sizes
        for number, size in enumerate(SIZES[sizes]):
            if self.options.quick and number != len(SIZES[sizes]) // 2:
                continue
            torch.manual_seed(0)
            cases = Cases(size, DTYPES[dtype], self.device, others=self.device == "cuda")
            for name, make in cases:
                if not self.options.only or any(word in name for word in self.options.only):
                    self.case(name, make, cases, number, dtype, rate)

    def case(
        self, name: str, make: Callable[[], Case], cases: Cases, number: int, dtype: str, rate: float
    ) -> None:
        if time.time() > self.options.until:
            self.left_out.append(f"{name} ({cases.size.name}, {dtype})")
            return
        print(f"{dtype}, {cases.size.name}: {name}", file=sys.stderr)
        case = make()
        try:
            sides, broken = make_sides(case, self.options.compile)
        except Exception as error:
            self.wrong = True
            self.notes.append(f"FAILED: {name}, {cases.size.name}, {dtype}: {error}")
            return
        times = dict(
            zip((s.name for s in sides), take_turns(sides, self.options.rounds, self.device), strict=True)
        )
        memory: dict[str, float] = {}
        if self.device == "cuda":
            memory = cuda_memory(sides)
        elif self.pool is not None:
            del sides
            arguments = (self.options.sizes, number, dtype, name, COMPILED in times)
            try:
                memory = self.pool.submit(cpu_memory, *arguments).result()
            except Exception as error:
                self.notes.append(f"no memory from {name}, {cases.size.name}, {dtype} on: {error}")
                self.pool = None
        least = case.moved / self.bandwidth + case.flops / rate
        print(row(case, times, memory, least), flush=True)
        for other in case.others.keys() & times.keys():
            milliseconds = spread([1e3 * t for t in times[other]], 2)
            cells = (dtype, name, case.shape, other, milliseconds, ratio(times[other], times[OURS]))
            self.others.append(f"| {' | '.join(cells)} | {memory.get(other, 0):.1f} |")
        self.notes += [
            f"{name}, {cases.size.name}, {dtype}: no {side}: {why}" for side, why in broken.items()
        ]

    def finish(self) -> None:
        if self.others:
            print("\n#### Other kernels\n\n| type | operation | shape | side | ms | side / ours | MiB |")
            print(f"|{' --- |' * 7}")
            print("\n".join(self.others))
        if self.left_out:
            self.notes.append(f"left out, the time being up: {'; '.join(self.left_out)}")
        if self.notes:
            print()
            print("\n".join(f"- {note}" for note in self.notes))
        if self.pool is not None:
            self.pool.shutdown()


def main() -> int:
    made = parser(__doc__, rounds=7)
    made.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="default: fp32 and bf16")
    made.add_argument("--sizes", choices=tuple(SIZES), help="default: those of the device")
    made.add_argument("--only", action="append", metavar="WORD", help="operations whose name holds a word")
    made.add_argument("--quick", action="store_true", help="one size, 3 rounds")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    made.add_argument(
        "--list", action="store_true", help="print the operations and which of the seam they use"
    )
    options = parse(made)
    options.sizes = options.sizes or options.device
    if options.list:
        for name, make in Cases(SIZES["tiny"][0], torch.float32, "cpu", others=False):
            print(f"{name}: {' '.join(make().ops)}")
        return 0
    if options.quick:
        options.rounds = min(options.rounds, 3)
    torch.set_num_threads(options.threads)
    print(header(options, f"{options.rounds} rounds, alternating; a call is forward and backward"))
    run = Run(options)
    if options.device == "cpu":
        set_cpu_allocator()
    # On a GPU what is used most comes first: a time limit cuts the rest.
    for dtype in options.dtype or (("bf16", "fp32") if options.device == "cuda" else ("fp32", "bf16")):
        run.table(dtype)
    run.finish()
    return int(run.wrong)


if __name__ == "__main__":
    sys.exit(main())
