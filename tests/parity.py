"""What "the same training" means: bounds on losses and gradient norms against a run of one process."""

from dataclasses import replace
from functools import cache

import pytest

from tests.training_case import Case, run

LOSS, NORM = 2e-6, 1e-5  # nats, and a part of the norm
BF16_LOSS, BF16_NORM = 2e-3, 1e-2

Steps = list[tuple[float, float]]


@cache
def reference(case: Case) -> Steps:
    """The run of one rank, done once for all tests that compare with it."""
    (steps,) = run(case)
    return steps


def one_process(case: Case) -> Case:
    """The same training on one rank, as plain as it gets: no ZeRO (but for the fp32 masters of bf16)."""
    settings = {
        path: value
        for path, value in case.settings.items()
        if not path.startswith(("deepspeed", "parallel", "train.micro"))
    }
    zero = 0 if case.precision == "fp32" else 1
    return replace(
        case, tensor=1, pipeline=1, data=1, zero=zero, sequence=False, recompute="none", settings=settings
    )


def assert_same_training(steps: Steps, expected: Steps, where: str, precision: str = "fp32") -> None:
    loss, norm = (LOSS, NORM) if precision == "fp32" else (BF16_LOSS, BF16_NORM)
    assert [step[0] for step in steps] == pytest.approx([step[0] for step in expected], abs=loss), where
    assert [step[1] for step in steps] == pytest.approx([step[1] for step in expected], rel=norm), where


def assert_parity(case: Case) -> None:
    """Every rank of a layout trains as one process does, clipping included."""
    expected = reference(one_process(case))
    assert any(norm > case.config().optimizer.grad_clip for _, norm in expected), "nothing was clipped"
    for rank, steps in enumerate(run(case)):
        assert_same_training(steps, expected, f"rank {rank} of {case}", case.precision)
