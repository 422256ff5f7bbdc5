"""An engine's state through the checkpoint store: bit for bit the same training after a resume on the same layout."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import Reader, save
from megatron_lite.training.engine import Engine
from megatron_lite.training.optimizer_state import zero3_part
from tests.distributed import run_ranks
from tests.parity import LOSS
from tests.training_case import Case, import_what_ranks_import, make_engine, train

HALF, ALL = 5, 10


@dataclass
class Rest:
    """The second half of a run on one rank: its steps, and a digest of all that a checkpoint would hold after it."""

    steps: list[tuple[float, float]]
    digest: str


def save_engine(engine: Engine, folder: str, step: int) -> None:
    def gather(value: object) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    save(
        folder,
        step,
        engine.pieces(),
        {"engine": engine.state()},
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        gather=gather,
    )


def second_half(engine: Engine) -> Rest:
    steps = train(engine, range(HALF, ALL))
    digest = hashlib.sha256()
    for piece in engine.pieces():
        digest.update(repr((piece.name, piece.kind, piece.start, piece.flat_start)).encode())
        digest.update(piece.data.contiguous().numpy().tobytes())
    return Rest(steps, digest.hexdigest())


def interrupted(case: Case, folder: str) -> Rest:
    engine = make_engine(case.config())
    train(engine, range(HALF))
    save_engine(engine, folder, HALF)
    return second_half(engine)


def resumed(case: Case, folder: str) -> Rest:
    engine = make_engine(case.config())
    engine.load(Reader(f"{folder}/step_{HALF:08d}"))
    return second_half(engine)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a case once, saving after half of it: the folder, and what each rank did with the rest."""
    import_what_ranks_import()

    @cache
    def run_once(case: Case) -> tuple[Path, list[Rest]]:
        folder = tmp_path_factory.mktemp("checkpoints")
        return folder, run_ranks(case.world_size, interrupted, case, str(folder))

    return run_once


SOURCES = {
    "3d": Case(2, 2, 2, zero=1),
    "tensor zero0": Case(2, 1, 2, zero=0, style="llama", tied=False),
    "tensor zero2": Case(2, 1, 2, zero=2, tied=False),
    "tensor zero3": Case(2, 1, 2, zero=3, style="llama"),
    "sequence": Case(4, 1, 1, zero=1, sequence=True),
    "pipeline zero0": Case(1, 4, 2, zero=0, style="llama"),
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
OFFLOAD = {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}}
SAME = {
    **SOURCES,
    "one rank": Case(zero=0),
    "data zero2": Case(data=2, zero=2),
    "dropout": Case(2, 2, model=DROPOUT),
    "bf16 one rank": Case(zero=0, precision="bf16"),
    "bf16 data zero0": Case(data=2, zero=0, precision="bf16"),
    "bf16 3d": Case(2, 2, 2, zero=1, precision="bf16"),
    "bf16 zero1": Case(2, 1, 2, zero=1, sequence=True, style="llama", precision="bf16"),
    "bf16 zero2": Case(data=2, zero=2, style="llama", tied=False, precision="bf16"),
    "bf16 zero3": Case(2, 1, 2, zero=3, precision="bf16"),
    "offload zero2": Case(data=2, zero=2, settings=OFFLOAD),
    "offload zero3": Case(data=2, zero=3, settings=OFFLOAD),
}


@pytest.mark.parametrize("case", SAME.values(), ids=SAME)
def test_bitwise_on_the_same_layout(saved: Any, case: Case) -> None:
    folder, uninterrupted = saved(case)
    assert run_ranks(case.world_size, resumed, case, str(folder)) == uninterrupted


def weights_alone(case: Case, folder: str) -> tuple[list[int], float]:
    engine = make_engine(case.config())
    engine.load(Reader(f"{folder}/step_{HALF:08d}"), weights_only=True)
    before = engine.state()["optimizer_steps"]
    ((loss, _),) = train(engine, range(HALF, HALF + 1))
    return [before, engine.state()["optimizer_steps"]], loss


@pytest.mark.parametrize("case", [Case(zero=0), Case(2, 1, 2, zero=3), Case(1, 2, 2)], ids=str)
def test_weights_alone_start_a_new_optimizer(saved: Any, case: Case) -> None:
    folder, uninterrupted = saved(SOURCES["3d"])
    for counts, loss in run_ranks(case.world_size, weights_alone, case, str(folder)):
        assert counts == [0, 1]
        assert loss == pytest.approx(uninterrupted[0].steps[0][0], abs=LOSS)


def test_loading_over_a_trained_engine(saved: Any) -> None:
    """Nothing of what an engine did before stays when a checkpoint is loaded into it."""
    case = SOURCES["tensor zero3"]
    folder, uninterrupted = saved(case)
    assert run_ranks(case.world_size, went_astray, case, str(folder)) == uninterrupted


def went_astray(case: Case, folder: str) -> Rest:
    engine = make_engine(case.config())
    train(engine, range(20, 23))
    engine.load(Reader(f"{folder}/step_{HALF:08d}"))
    return second_half(engine)


def partitioned(numel: int) -> tuple[int, list[float]]:
    """What this rank holds of 0, 1, 2, … under ZeRO-3: from where on, and the numbers."""
    parameter: Any = torch.nn.Parameter(torch.arange(float(numel)))
    module = torch.nn.ParameterList([parameter])
    deepspeed.zero.Init(
        module=module, config_dict_or_path={"train_batch_size": 4, "zero_optimization": {"stage": 3}}
    )
    start, count = zero3_part(parameter)
    own = parameter.ds_tensor[:count]
    assert own.numel() == count
    return start, own.tolist()


@pytest.mark.parametrize("numel", [1, 5, 8, 9])
def test_a_parameter_in_parts_of_which_some_are_empty(numel: int) -> None:
    import_what_ranks_import()
    parts = run_ranks(4, partitioned, numel)
    assert [number for _, numbers in parts for number in numbers] == list(range(numel))
    assert all(start == numbers[0] for start, numbers in parts if numbers)
