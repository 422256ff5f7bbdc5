"""The learning rate, step by step."""

import math

import pytest

from megatron_lite.config import Config
from megatron_lite.training.schedule import learning_rate
from tests.training_case import Case


def make(**optimizer: object) -> Config:
    settings: dict[str, object] = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **optimizer}
    return Case(
        settings={"train.steps": 24, **{f"optimizer.{key}": value for key, value in settings.items()}}
    ).config()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_begins_above_zero_and_reaches_the_peak(schedule: str) -> None:
    config = make(schedule=schedule)
    assert [learning_rate(config, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 4) == 1.0


def test_without_warmup_the_first_step_takes_the_peak() -> None:
    assert learning_rate(make(warmup_steps=0), 0) == 1.0


def test_cosine() -> None:
    config = make()
    assert learning_rate(config, 14) == pytest.approx(0.55)  # halfway
    assert learning_rate(config, 9) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 24) == learning_rate(config, 100) == pytest.approx(0.1)


def test_linear() -> None:
    config = make(schedule="linear")
    assert [learning_rate(config, step) for step in (4, 9, 14, 24, 30)] == pytest.approx(
        [1.0, 0.775, 0.55, 0.1, 0.1]
    )


def test_wsd_holds_the_peak_then_decays() -> None:
    config = make(schedule="wsd", wsd_decay_steps=8)
    assert {learning_rate(config, step) for step in range(4, 17)} == {1.0}
    assert [learning_rate(config, step) for step in (18, 20, 24, 30)] == pytest.approx(
        [0.775, 0.55, 0.1, 0.1]
    )


def test_wsd_decays_over_the_last_tenth_by_default() -> None:
    config = make(schedule="wsd")
    assert learning_rate(config, 22) == 1.0
    assert learning_rate(config, 23) == pytest.approx(0.55)


def test_constant() -> None:
    assert {learning_rate(make(schedule="constant"), step) for step in (4, 23, 1000)} == {1.0}


def test_decay_may_end_before_training() -> None:
    config = make(schedule="linear", decay_steps=14)
    assert learning_rate(config, 9) == pytest.approx(0.55)
    assert [learning_rate(config, step) for step in (14, 20, 23)] == pytest.approx([0.1, 0.1, 0.1])
