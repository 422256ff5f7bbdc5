"""A number that is not finite is found where it was planted, and never reaches the weights."""

import hashlib
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.training import engine as engine_module
from megatron_lite.training.engine import Engine
from megatron_lite.training.resilience import NonFinite, RunFailed, StopSignals, check_finite
from tests.distributed import run_ranks
from tests.training_case import Case, import_what_ranks_import, make_engine, rank_batches

STEP = 3
CASES = [
    Case(),
    Case(zero=0),
    Case(tensor=2, data=2, zero=2, style="llama"),
    Case(data=2, zero=3, tied=False),
    Case(pipeline=2, tensor=2),
    Case(pipeline=2, data=2, zero=0, tied=False, recompute="full"),
    Case(pipeline=2, precision="bf16"),
]


def plant_parameter(engine: Engine) -> str:
    """A weight of the layer; whatever uses it goes bad too."""
    name, parameter = _middle_parameter(engine)
    held = getattr(parameter, "ds_tensor", parameter.data)
    held.view(-1)[0] = math.nan
    return f"the parameter {name}" if held.data_ptr() == parameter.data_ptr() else "the output of blocks.1"


def plant_output(engine: Engine) -> str:
    layer = dict(engine.named_layers())["blocks.1"]

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * math.inf

    layer.register_forward_hook(spoil)
    return "the output of blocks.1"


def plant_gradient(engine: Engine) -> str:
    """Only in the gradient of one parameter, so that nothing else shows it."""
    name, parameter = _middle_parameter(engine)
    parameter.register_hook(lambda gradient: gradient * math.nan)
    return f"the gradient of the parameter {name}"


def plant_output_gradient(engine: Engine) -> str:
    layer = dict(engine.named_layers())["blocks.1"]

    def spoil(module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * math.nan)

    layer.register_forward_hook(spoil)
    return "the gradient of the output of blocks.1"


def plant_loss(engine: Engine) -> str:
    names = vars(engine_module)
    right: Callable[..., Tensor] = names["weighted_loss"]
    names["weighted_loss"] = lambda *args, **more: right(*args, **more) * math.nan
    return "it comes from the loss"


def _middle_parameter(engine: Engine) -> tuple[str, torch.nn.Parameter]:
    return next((n, p) for n, p in engine.named_parameters() if n == "blocks.1.mlp.linear_fc1.weight")


def culprit(case: Case, last_stage: bool) -> int:
    """The rank to spoil: in its stage the last of all, so that no rank is named by default."""
    copies = case.tensor * case.data
    stages = [stage for stage in range(case.pipeline) if stage == (case.pipeline - 1 if last_stage else 0)]
    return stages[0] * copies + copies - 1


def digest(engine: Engine) -> str:
    """All that a checkpoint would hold, but for what never changes."""
    total = hashlib.sha256()
    for piece in engine.pieces():
        assert isinstance(piece.data, Tensor)
        total.update(piece.data.contiguous().numpy().tobytes())
    return total.hexdigest() + str(engine.state()["optimizer_steps"])


def spoiled_step(
    case: Case, plant: Callable[[Engine], str], last_stage: bool
) -> tuple[str, str, bool, list[float]]:
    """(error or warning, what was planted, whether the state is as before, loss and norm of this rank's step)"""
    engine = make_engine(case.config())
    mesh = engine.mesh

    def batches(step: int) -> Any:
        return rank_batches(step, engine.config, mesh.data_rank, mesh.data_size)

    for step in range(STEP - 1):
        engine.train_step(batches(step), step)
    rank = culprit(case, last_stage)
    # Tensor ranks work out one loss together, so that all of them have a bad one.
    spoiled = range(rank - case.tensor + 1, rank + 1) if plant is plant_loss else [rank]
    planted = plant(engine) if mesh.rank in spoiled else ""
    before = digest(engine)
    result = engine.train_step(batches(STEP - 1), STEP - 1)
    message = ""
    try:
        check_finite(engine, result, batches(STEP - 1), STEP - 1)
    except NonFinite as error:
        message = str(error)
    return message, planted, digest(engine) == before, [result.loss, result.grad_norm]


@pytest.mark.parametrize(
    "plant", [plant_parameter, plant_output, plant_gradient, plant_output_gradient, plant_loss]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stop_names_the_culprit_on_every_rank(case: Case, plant: Callable[[Engine], str]) -> None:
    import_what_ranks_import()
    last_stage = plant is plant_loss
    results = run_ranks(case.world_size, spoiled_step, case, plant, last_stage)
    rank = culprit(case, last_stage)
    (message,) = {message for message, *_ in results}
    assert f"step {STEP}: " in message
    assert results[rank][1] in message
    assert all(same for _, _, same, _ in results)
    named = int(message.partition(" on rank ")[2].split()[0])
    if plant is plant_loss:
        assert named in range(rank - case.tensor + 1, rank + 1)
    elif plant is plant_parameter and results[rank][1] == "the output of blocks.1":
        assert named in range(case.world_size)  # ZeRO-3 gathered it: every rank computes with it
    else:
        assert named == rank
    what = "loss" if plant in (plant_parameter, plant_output, plant_loss) else "gradient"
    assert f"the {what} is not finite" in message


def skipping_run(case: Case) -> tuple[list[bool], bool, list[str]]:
    """Three steps of which the second has a bad gradient: finite or not, state kept, warnings."""
    engine = make_engine(case.config())
    mesh, warnings, finite, kept = engine.mesh, [], [], False

    def note(message: str, *args: Any) -> None:
        warnings.append(message % args)

    from megatron_lite.training import resilience

    resilience.logger.warning = note  # type: ignore[method-assign, assignment]
    for step in range(3):
        before = digest(engine)
        batches = rank_batches(step, engine.config, mesh.data_rank, mesh.data_size)
        handle = None
        if step == 1 and mesh.rank == culprit(case, last_stage=False):
            handle = _middle_parameter(engine)[1].register_hook(lambda gradient: gradient * math.inf)
        result = engine.train_step(batches, step)
        check_finite(engine, result, batches, step)
        if handle is not None:
            handle.remove()
        finite.append(math.isfinite(result.loss) and math.isfinite(result.grad_norm) and not result.skipped)
        if step == 1:
            kept = digest(engine) == before
        else:
            assert digest(engine) != before
    return finite, kept, warnings


@pytest.mark.parametrize("case", CASES, ids=str)
def test_skip_goes_on_with_the_weights_untouched(case: Case) -> None:
    import_what_ranks_import()
    case = Case(**{**vars(case), "settings": {"train.on_nonfinite": "skip"}})
    results = run_ranks(case.world_size, skipping_run, case)
    for rank, (finite, kept, warnings) in enumerate(results):
        assert finite == [True, False, True]
        assert kept
        assert len(warnings) == (1 if rank == 0 else 0)
    assert results[0][2][0].startswith("step 2: the gradient is not finite")
    assert results[0][2][0].endswith("the step was skipped")


def fault_that_does_not_return() -> str:
    engine = make_engine(Case().config())
    batches = rank_batches(0, engine.config, 0, 1)
    handle = _middle_parameter(engine)[1].register_hook(lambda gradient: gradient * math.nan)
    result = engine.train_step(batches, 0)
    handle.remove()
    with pytest.raises(NonFinite) as error:
        check_finite(engine, result, batches, 0)
    return str(error.value)


def test_a_fault_that_does_not_come_again_is_said_to_be_one() -> None:
    import_what_ranks_import()
    (message,) = run_ranks(1, fault_that_does_not_return)
    assert "run again is finite" in message


def test_nonfinite_is_told_once() -> None:
    assert issubclass(NonFinite, RunFailed)
    assert NonFinite("…").shared


def one_rank_is_told(number: int) -> tuple[list[bool], list[bool], str | None]:
    stop = StopSignals(torch.device("cpu"))
    before = stop.agreed(dist.get_rank() == 2, False)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    return before, stop.agreed(), stop.received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_one_rank_stops_all(number: signal.Signals) -> None:
    results = run_ranks(3, one_rank_is_told, number)
    assert [(before, after) for before, after, _ in results] == [([False, True, False], [True])] * 3
    assert [received for *_, received in results] == [None, number.name, None]
