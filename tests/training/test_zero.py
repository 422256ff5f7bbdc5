"""What is asked of ZeRO: nothing where there is nothing to divide, buffers and reductions elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.zero import deepspeed_settings
from tests.distributed import run_ranks
from tests.parity import assert_parity
from tests.training_case import Case, import_what_ranks_import, make_engine, train

ZERO = "deepspeed.zero_optimization"
OFFLOAD = {f"{ZERO}.offload_optimizer": {"device": "cpu"}}


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    import_what_ranks_import()


def wrapper(case: Case) -> str:
    return type(make_engine(case.config()).deepspeed.optimizer).__name__


WHOLE = [
    *(Case(zero=zero, precision=precision) for zero in range(3) for precision in ("fp32", "bf16")),
    Case(data=2, zero=0),
    Case(pipeline=2, precision="bf16"),
    Case(tensor=2),
]
DIVIDED = [
    *(Case(data=2, zero=zero) for zero in (1, 2, 3)),
    Case(data=2, precision="bf16"),
    Case(zero=3),
    Case(zero=2, settings=OFFLOAD),
]


@pytest.mark.parametrize("case", [*WHOLE, *DIVIDED], ids=str)
def test_ranks_that_divide_nothing_keep_no_copies(case: Case) -> None:
    for name in run_ranks(case.world_size, wrapper, case):
        assert (name == "WholeAdamW") == (case in WHOLE), name


def collectives_of_a_step(case: Case) -> int:
    engine = make_engine(case.config())
    calls = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return count

    for name in ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce"):
        setattr(dist, name, counting(getattr(dist, name)))
    train(engine, range(1))
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_talks_to_nobody(precision: str) -> None:
    """DeepSpeed reduces over one rank as over many: by way of a buffer."""
    assert run_ranks(1, collectives_of_a_step, Case(precision=precision)) == [0]
    assert run_ranks(2, collectives_of_a_step, Case(precision=precision, data=2))[0] > 0


def zero_settings(case: Case, device: str) -> dict[str, Any]:
    mesh = Mesh(tensor_size=case.tensor, pipeline_size=case.pipeline, data_size=case.data)
    found = deepspeed_settings(case.config(), mesh, torch.device(device))["zero_optimization"]
    assert isinstance(found, dict)
    return found


def test_reductions_overlap_where_there_are_streams() -> None:
    for zero in (1, 2, 3):
        case = Case(data=2, zero=zero)
        assert zero_settings(case, "cuda")["overlap_comm"] is True
        assert "overlap_comm" not in zero_settings(case, "cpu")
        off = replace(case, settings={f"{ZERO}.overlap_comm": False})
        assert zero_settings(off, "cuda")["overlap_comm"] is False
    assert "overlap_comm" not in zero_settings(Case(pipeline=2, data=2), "cuda"), (
        "DeepSpeed refuses it, aloud"
    )


def test_buckets_are_smaller_than_deepspeeds() -> None:
    assert zero_settings(Case(data=2), "cpu")["reduce_bucket_size"] == 40_000_000
    given = Case(data=2, settings={f"{ZERO}.reduce_bucket_size": 123})
    assert zero_settings(given, "cpu")["reduce_bucket_size"] == 123


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_many_buckets_and_overlap_train_as_one(zero: int) -> None:
    """A bucket of 500 elements is smaller than most parameters here."""
    settings = {f"{ZERO}.reduce_bucket_size": 500, f"{ZERO}.overlap_comm": True}
    assert_parity(Case(data=2, zero=zero, settings=settings, steps=3))


def reduced_outside_the_buffers(case: Case) -> int:
    """Elements of all-reduces, more than one number, that are not the optimizer's own gradients."""
    engine = make_engine(case.config())
    kept = {flat.data_ptr() for flat in engine.deepspeed.optimizer.fp32_groups_gradients_flat}
    outside, reduce = 0, dist.all_reduce

    def watching(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal outside
        outside += tensor.numel() if tensor.numel() > 1 and tensor.data_ptr() not in kept else 0
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = watching
    train(engine, range(1))
    return outside


@pytest.mark.parametrize("pipeline", [1, 2])
def test_flat_gradients_are_reduced_where_they_are(pipeline: int) -> None:
    """DeepSpeed would join the two of them into one, and copy the sum back."""
    settings = {"deepspeed.communication_data_type": "fp32"}  # else they are also cast
    case = Case(pipeline=pipeline, data=2, precision="bf16", tied=False, settings=settings)
    assert run_ranks(case.world_size, reduced_outside_the_buffers, case) == [0] * case.world_size
