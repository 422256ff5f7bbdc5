"""What keeps a run alive, or ends it with a reason: signals, and numbers that are not finite."""

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils.hooks import RemovableHandle

from megatron_lite.data.loader import Batch
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.training.engine import Engine, StepResult

logger = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """Training cannot go on, for a reason that the message tells.

    Attributes:
        shared: every rank raises it with the same message, so that one of them tells the user.
    """

    def __init__(self, message: str, shared: bool = True) -> None:
        super().__init__(message)
        self.shared = shared


class NonFinite(RunFailed):
    """The loss or a gradient is not finite, and the configuration says to stop."""


class PeerWatch:
    """Ends this process soon after another rank of its node has died, or another node has left word of that.

    A rank that waits in NCCL for a dead peer does not notice by itself. A thread looks after the processes of this
    node, and the rendezvous store carries the word to the others.
    """

    seconds = 5.0
    _key = "megatron_lite/rank_died"

    def __init__(self) -> None:
        host = socket.gethostname()
        peers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peers, (host, os.getpid()))
        self._peers = {rank: pid for rank, (name, pid) in enumerate(peers) if name == host}
        self._store = distributed_c10d._get_default_store()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> "PeerWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the watch; where the run ended well, only after every rank got as far."""
        if exception[0] is None:
            dist.barrier()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.seconds):
            dead = [rank for rank, pid in self._peers.items() if not _alive(pid)]
            with contextlib.suppress(Exception):  # the store dies with its host, the first rank
                if dead:
                    self._store.set(self._key, str(dead[0]))
                elif self._store.check([self._key]):
                    dead = [int(self._store.get(self._key))]
            if dead and not self._done.is_set():
                print(f"error: rank {dead[0]} died; this rank ends with it", file=sys.stderr, flush=True)
                os._exit(1)


def _alive(pid: int) -> bool:
    """False for a process that is gone, or a zombie: dead, and nobody has waited for it yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class StopSignals:
    """Remembers SIGTERM and SIGUSR1, so that the run saves and ends after the current step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self, *others: bool) -> list[bool]:
        """Whether any rank was told to stop, and for each of `others` whether any rank gave True.

        Collective: ranks must leave the loop together.
        """
        # On the device of the model: NCCL is faster than gloo at many ranks.
        flags = torch.tensor([self.received is not None, *others], dtype=torch.int32, device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]


def check_finite(engine: Engine, result: StepResult, batches: list[Batch], step: int) -> None:
    """Deals with a step whose loss or gradient was not finite; its update has already been left out.

    An fp16 overflow is part of loss scaling and passes, as long as the loss itself is finite.

    Raises:
        NonFinite: `train.on_nonfinite` is stop; the message names the rank, step and layer.
    """
    overflow = engine.config.train.precision == "fp16" and result.skipped
    if math.isfinite(result.loss) and (math.isfinite(result.grad_norm) or overflow):
        return
    what = "gradient" if math.isfinite(result.loss) else "loss"
    message = f"step {step + 1}: the {what} is not finite; {find_nonfinite(engine, batches, step)}"
    if engine.config.train.on_nonfinite == "stop":
        raise NonFinite(
            f"{message}. The weights were left as they were before this step. Lower optimizer.lr or "
            "optimizer.grad_clip, look at the data of this step, or set train.on_nonfinite to skip"
        )
    if engine.mesh.rank == 0:
        logger.warning("%s; the step was skipped", message)


class _Find(NamedTuple):
    """A number that is not finite. Ordered by where in the model it is, from input to output."""

    stage: int
    layer: int
    rank: str
    what: str


def find_nonfinite(engine: Engine, batches: list[Batch], step: int) -> str:
    """Names the rank and layer where the first number that is not finite comes from. Collective.

    Runs the step again with every layer watched; its update is left out again, for the same reason, or changes no
    weight where the second run is finite.
    """
    engine.set_learning_rate(0.0)
    stage, rank = engine.mesh.pipeline_rank, engine.mesh.describe()
    forward: list[_Find] = []
    backward: list[_Find] = []
    for name, parameter in engine.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            forward.append(_Find(stage, -1, rank, f"the parameter {name}"))
            break
    with contextlib.ExitStack() as stack:
        for number, (name, layer) in enumerate(engine.named_layers()):
            stack.enter_context(_watched(layer, name, partial(_Find, stage, number, rank), forward, backward))
        again = engine.train_step(batches, step)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (forward[:1], backward[:1]))
    outputs = [find for finds, _ in reports for find in finds]
    gradients = [find for _, finds in reports for find in finds]
    # Forward numbers go bad downstream of their cause, gradients upstream of it.
    if outputs:
        return f"it first appears on {min(outputs).rank} in {min(outputs).what}"
    if gradients and not math.isfinite(again.loss):
        return f"every layer's output is finite: it comes from the loss on {max(gradients).rank}"
    if gradients:
        return f"it first appears on {max(gradients).rank} in the gradient of {max(gradients).what}"
    if math.isfinite(again.loss) and math.isfinite(again.grad_norm):
        return "the same step run again is finite: suspect the hardware"
    return "every layer's output and gradient is finite"


@contextlib.contextmanager
def _watched(
    layer: nn.Module, name: str, find: Callable[[str], _Find], forward: list[_Find], backward: list[_Find]
) -> Iterator[None]:
    """Notes what goes bad: the layer's output, the gradient that reaches it, the gradients of its parameters."""

    def note(tensor: Tensor, what: str, finds: list[_Find]) -> None:
        if not torch.isfinite(tensor.detach()).all():
            finds.append(find(what))

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        note(hidden, f"the output of {name}", forward)
        if hidden.requires_grad:
            hidden.register_hook(partial(note, what=f"the output of {name}", finds=backward))

    handles: list[RemovableHandle] = [layer.register_forward_hook(look)]
    for parameter in layer.parameters():
        what = f"the parameter {spec_of(parameter).name}"
        handles.append(parameter.register_hook(partial(note, what=what, finds=backward)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
