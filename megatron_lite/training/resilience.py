"""What keeps a run alive, or ends it with a reason: signals, and numbers that are not finite."""

import contextlib
import logging
import math
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.data.loader import Batch
from megatron_lite.training.engine import Engine, StepResult

logger = logging.getLogger(__name__)


class NonFinite(RuntimeError):
    """The loss or a gradient is not finite, and the configuration says to stop."""


class StopSignals:
    """Remembers SIGTERM and SIGUSR1, so that the run saves and ends after the current step."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was told to stop. Collective: ranks must leave the loop together."""
        flag = torch.tensor(int(self.received is not None))
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


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


def find_nonfinite(engine: Engine, batches: list[Batch], step: int) -> str:
    """Names the rank and layer where the first number that is not finite comes from. Collective.

    Runs the step again with every layer watched; its update is left out again, for the same reason.
    """
    forward: list[str] = []
    backward: list[str] = []
    for name, parameter in engine.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            forward.append(f"parameter {name}")
            break
    with contextlib.ExitStack() as stack:
        for name, layer in engine.named_layers():
            stack.enter_context(_watched(layer, name, forward, backward))
        engine.train_step(batches, step)
    reports: list[Any] = [None] * dist.get_world_size()
    stage = engine.mesh.pipeline_rank
    mine = (stage, engine.mesh.describe(), forward[:1], backward[:1])
    dist.all_gather_object(reports, mine)
    # Forward numbers go bad downstream of their cause, gradients upstream of it.
    bad = sorted((r for r in reports if r[2]), key=lambda r: r[0])
    if bad:
        return f"it first appears on {bad[0][1]} in {bad[0][2][0]}"
    bad = sorted((r for r in reports if r[3]), key=lambda r: -r[0])
    if bad:
        return f"it first appears on {bad[0][1]} in the gradient of {bad[0][3][0]}"
    last = max(reports, key=lambda r: r[0])
    return f"every layer's output and gradient is finite: it comes from the loss on {last[1]}"


@contextlib.contextmanager
def _watched(layer: nn.Module, name: str, forward: list[str], backward: list[str]) -> Iterator[None]:
    """Appends the layer's name where its output, or the gradient that reaches its output or leaves it, goes bad."""

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if not torch.isfinite(hidden.detach()).all():
            forward.append(f"the output of {name}")
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: _note(grad, f"the output of {name}", backward))

    handle = layer.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _note(grad: Tensor, name: str, found: list[str]) -> None:
    if not torch.isfinite(grad).all():
        found.append(name)
