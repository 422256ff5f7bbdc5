"""Saving and loading a model with its optimizer state: ours, torch.save, torch.distributed.checkpoint, DeepSpeed.

Sides take turns, each turn in a process of its own with one rank on the CPU. Directly before and after, a turn writes
and reads as many bytes as its side does, in one plain file past the page cache (`benchmarks/disk.py`): the mean is the
disk's own rate at that moment (many disks are faster for a while after a rest), and ratios are to that.
Writing ends when the disk has the data (fsync; of torch.save's and DeepSpeed's files, which they do not do, by us).
Before anything is read its pages are dropped from the page cache (posix_fadvise). Loading ends with everything in the
memory of the model and optimizer; ours has verified every checksum then, the others verify nothing.

Saves beside training run beside steps of matrix products, about a second and a half each (`benchmarks/beside.py`), one
after the other until the save is done; torch's stages in a thread, as ours copies. `stall` is how long the computing
thread is kept: the call, and the wait before the state may change, at the end of the first step. That is not all that
such a save costs, since it takes cores and memory from the computing: `computing s more` is how much longer all of it
took, until the save was done, than as much of it alone in the same turn. `save s` of these sides is beside computing.
Measured is the second save, as the first takes the memory that later ones have.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare import ROOT
from beside import PRODUCTS, Save, beside_computing
from common import header, spread
from disk import drop, read_seconds, write_seconds

from megatron_lite.config import ModelConfig
from megatron_lite.model.gpt import gpt_layers
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import spec_of

State = dict[str, dict[str, torch.Tensor]]  # kind -> name -> tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SIZES = {
    "350m": (24, 1024, 50304),
    "125m": (12, 768, 50304),
    "tiny": (2, 64, 512),
}  # layers, hidden, vocabulary
SIDES = ("ours", "ours async", "torch.save", "torch dcp", "torch dcp async", "deepspeed", "reshard")
RESHARD = ["--to", "megatron_lite", "--tensor", "2", "--pipeline", "2", "--data", "2"]


def model_of(size: str) -> ModelConfig:
    """A GPT-2."""
    layers, hidden, vocabulary = SIZES[size]
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=max(1, hidden // 64),
        seq_length=1024,
        vocab_size=vocabulary,
    )


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Its parameters."""
    layers = gpt_layers(model_of(size), Runtime(Mesh(), device=torch.device("meta")))
    specs = [
        spec_of(parameter)
        for layer in layers
        if not layer.tied_to
        for parameter in layer.build(None).parameters()
    ]
    return {spec.name: spec.global_shape for spec in specs}


def make_state(size: str) -> State:
    torch.manual_seed(1)
    noise = torch.randn(max(math.prod(shape) for shape in shapes(size).values()))
    return {
        kind: {name: noise[: math.prod(s)].reshape(s) * (1 + at) for name, s in shapes(size).items()}
        for at, kind in enumerate(KINDS)
    }


class Turn:
    """One turn of a side: what was measured, in seconds, and the disk's own time for as many bytes."""

    def __init__(self, folder: Path, products: int) -> None:
        self.folder, self.products = folder / "checkpoint", products
        self.plain = folder / "plain"
        self.found: dict[str, float] = {}

    def timed(self, name: str, action: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        action()
        self.found[name] = time.perf_counter() - begun
        return self.found[name]

    def save(self, size: int, action: Callable[[], Any]) -> None:
        """The disk, then `action`, to an empty folder, then the disk."""
        self.clear()
        before = write_seconds(self.plain, size)
        self.timed("save", action)
        self.plain.unlink()
        self.found["disk write"] = (before + write_seconds(self.plain, size)) / 2
        self.found["bytes"] = sum(path.stat().st_size for path in self.files())

    def save_beside(self, size: int, begin: Save) -> None:
        found: dict[str, float] = {}
        self.save(size, lambda: found.update(beside_computing(begin, self.products)))
        self.found |= found

    def load(self, action: Callable[[], Any]) -> None:
        for path in self.files():
            drop(path)
        before = read_seconds(self.plain)
        self.timed("load", action)
        self.found["disk read"] = (before + read_seconds(self.plain)) / 2

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def sync(self) -> None:
        """For sides that leave it to the system when the disk has their files."""
        for path in self.files():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.plain.unlink(missing_ok=True)


def ours(turn: Turn, size: str, background: bool) -> None:
    from megatron_lite.checkpoint import HostCopy, Piece, Reader, save, side_by_side

    state, host = make_state(size), HostCopy()
    pieces = [Piece.whole(name, kind, t) for kind, held in state.items() for name, t in held.items()]

    def begin() -> tuple[Callable[[], Any], Future[Any]]:
        thread, (copies, copy) = ThreadPoolExecutor(1), host.begin(pieces)
        copied = thread.submit(copy)
        return copied.result, thread.submit(save, turn.folder, 1, copies, {})

    if background:
        host.begin(pieces)[1]()
        turn.save_beside(bytes_of(state), begin)
        return
    turn.save(bytes_of(state), lambda: save(turn.folder, 1, pieces, {}))

    def load() -> None:
        with Reader(turn.folder / "step_00000001", check=True, once=KINDS[1:]) as reader:
            whole = (None, 0, None, 0)
            side_by_side(
                [partial(reader.read_into, tensor, name, kind, *whole)]
                for kind, held in state.items()
                for name, tensor in held.items()
            )
            reader.verify()

    turn.load(load)


def reshard(turn: Turn, size: str) -> None:
    from megatron_lite.checkpoint import Piece, save

    state, source = make_state(size), turn.folder.with_name("source")
    pieces = [Piece.whole(name, kind, t) for kind, held in state.items() for name, t in held.items()]
    made = save(
        source / "checkpoints", 1, pieces, {"config": {"model": model_of(size).model_dump(mode="json")}}
    )
    for path in made.iterdir():
        drop(path)
    # The command in this interpreter's place would have this process's memory as its least peak.
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    peak = "import atexit, pathlib; atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text()));"
    command = [sys.executable, "-c", peak + script, str(ROOT / "tools/convert_checkpoint.py"), *RESHARD]
    command += ["--load", str(source), "--save", str(turn.folder)]

    def cut() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        turn.found["peak"] = int(done.stdout.split("VmHWM:")[1].split()[0]) / 2**20

    turn.save(bytes_of(state), cut)
    turn.found["disk read"] = read_seconds(turn.plain)


def torch_save(turn: Turn, size: str) -> None:
    state = make_state(size)

    def save() -> None:
        turn.folder.mkdir()
        torch.save(state, turn.folder / "state.pt")
        turn.sync()

    def load() -> None:
        found = torch.load(turn.folder / "state.pt", weights_only=True)
        for kind, tensors in found.items():
            for name, tensor in tensors.items():
                state[kind][name].copy_(tensor)

    turn.save(bytes_of(state), save)
    turn.load(load)


def torch_dcp(turn: Turn, size: str, background: bool) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = make_state(size)
    flat = {f"{kind}/{name}": tensor for kind, held in state.items() for name, tensor in held.items()}
    if background:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = {"use_pinned_memory": False, "use_shared_memory": False, "use_non_blocking_copy": False}
        stager = DefaultStager(StagingOptions(use_async_staging=True, **options))

        def begin() -> tuple[Callable[[], Any], Future[Any]]:
            job = dcp.async_save(flat, checkpoint_id=turn.folder, async_stager=stager)
            return job.staging_completion.result, job.upload_completion

        begin()[1].result()  # it keeps its memory from the first save
        turn.save_beside(bytes_of(state), begin)
        return
    turn.save(bytes_of(state), lambda: dcp.save(flat, checkpoint_id=turn.folder))
    turn.load(lambda: dcp.load(flat, checkpoint_id=turn.folder))


def deepspeed_save(turn: Turn, size: str) -> None:
    """ZeRO-1 in bf16: bf16 weights beside the fp32 masters and moments."""
    import torch.distributed as dist

    import megatron_lite.training.engine  # noqa: F401  (which keeps DeepSpeed from compiling at its start)

    import deepspeed  # isort: skip

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = torch.nn.ParameterList([torch.full(shape, 0.5) for shape in shapes(size).values()])

        def forward(self) -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in self.all]).sum()

    model = Model().bfloat16()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), 1e-3, fused=True),
        config=settings,
        dist_init_required=False,
    )
    engine.backward(engine())
    engine.step()  # before it there are no moments

    def save() -> None:
        engine.save_checkpoint(str(turn.folder), "1")
        turn.sync()

    weights = sum(math.prod(shape) for shape in shapes(size).values())
    turn.save(14 * weights, save)
    turn.load(lambda: engine.load_checkpoint(str(turn.folder), "1"))


def bytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())


def take_turn(side: str, size: str, folder: Path) -> dict[str, float]:
    """In the process of a turn: its measurements, with the peak of its memory in GiB."""
    turn = Turn(folder, 1 if size == "tiny" else PRODUCTS)
    with contextlib.redirect_stdout(io.StringIO()):
        if side.startswith("ours"):
            ours(turn, size, side.endswith("async"))
        elif side.startswith("torch dcp"):
            torch_dcp(turn, size, side.endswith("async"))
        else:
            {"torch.save": torch_save, "deepspeed": deepspeed_save, "reshard": reshard}[side](turn, size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak": peak, **turn.found}


def run_turn(side: str, options: argparse.Namespace) -> dict[str, float] | str:
    """The measurements, or the last line of what the process said when it failed."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, __file__, "--size", options.size, "--turn", side, "--folder", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it died"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(results: dict[str, list[dict[str, float]]], errors: dict[str, str]) -> list[list[str]]:
    titles = ["side", "GB", "save s", "save GB/s", "of the disk's", "stall s", "of ours' sync save"]
    titles += ["computing s more", "load s", "load GB/s", "of the disk's", "peak GiB"]
    table = [titles, ["---"] * len(titles)]
    sync = [turn["save"] for turn in results.get("ours", [])]
    for side, turns in results.items():
        if side == "reshard" and turns:
            continue  # reads, too: it has a line of its own
        if not turns:
            table.append([side, errors[side], *[""] * (len(titles) - 2)])
            continue
        row = [side, f"{turns[0]['bytes'] / 1e9:.2f}"]
        row += [spread([turn["save"] for turn in turns], 2), *_rates(turns, "save", "disk write")]
        stalls = [turn["stall"] for turn in turns if "stall" in turn]
        row.append(spread(stalls, 3) if stalls else "-")
        row.append(f"{statistics.median(stalls) / statistics.median(sync):.1%}" if stalls and sync else "-")
        row.append(spread([turn["lost"] for turn in turns], 2) if stalls else "-")
        loads = [turn["load"] for turn in turns if "load" in turn]
        row += [spread(loads, 2), *_rates(turns, "load", "disk read")] if loads else ["-"] * 3
        table.append([*row, f"{max(turn['peak'] for turn in turns):.2f}"])
    return table


def _rates(turns: list[dict[str, float]], what: str, disk: str) -> list[str]:
    return [
        spread([turn["bytes"] / turn[what] / 1e9 for turn in turns], 2),
        spread([100 * turn[disk] / turn[what] for turn in turns], 0) + " %",
    ]


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=SIZES, default="350m", help="of the model (%(default)s)")
    made.add_argument("--quick", action="store_true", help="the tiny model, one round")
    made.add_argument("--rounds", type=int, default=5, help="turns of every side (%(default)s)")
    made.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a side (%(default)s)"
    )
    made.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    made.add_argument("--folder", type=Path, help="on the disk to be measured; default: the temporary folder")
    made.add_argument("--turn", choices=SIDES, help=argparse.SUPPRESS)
    options = made.parse_args()
    options.device = "cpu"
    if options.turn:
        print(json.dumps(take_turn(options.turn, options.size, options.folder)))
        return 0
    if options.quick:
        options.size, options.rounds = "tiny", 1
    results: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    errors: dict[str, str] = {}
    for number in range(options.rounds):
        for side in (
            options.sides[number % len(options.sides) :] + options.sides[: number % len(options.sides)]
        ):
            found = run_turn(side, options)
            if isinstance(found, str):
                errors[side] = found
            else:
                results[side].append(found)
    weights = sum(math.prod(shape) for shape in shapes(options.size).values())
    disk = [turn for turns in results.values() for turn in turns]
    print(header(options, f"{options.rounds} of every side, each a process"))
    print(f"- model: {weights / 1e6:.1f} M parameters, fp32 weights and two moments")
    for what, of in (("write", [t for t in disk if "save" in t]), ("read", [t for t in disk if "load" in t])):
        rates = [turn["bytes"] / turn[f"disk {what}"] / 1e9 for turn in of]
        print(f"- the disk's own sequential {what}: {spread(rates, 2) if rates else '-'} GB/s")
    if steps := [turn["computing"] for turn in disk if "computing" in turn]:
        print(f"- a step of the computing, alone: {spread(steps, 2)} s")
    for turns in filter(None, [results.get("reshard")]):
        rates = spread([turn["bytes"] / turn["save"] / 1e9 for turn in turns], 2)
        both = spread([100 * (turn["disk write"] + turn["disk read"]) / turn["save"] for turn in turns], 0)
        print(f"- reshard: {spread([turn['save'] for turn in turns], 2)} s, {rates} GB/s, peak", end=" ")
        print(
            f"{max(turn['peak'] for turn in turns):.2f} GiB; of the rate of reading and writing once: {both} %"
        )
    print()
    print("\n".join(f"| {' | '.join(row)} |" for row in rows(results, errors)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
