"""The dynamic loss scale (fp16) goes into a checkpoint and back; on a CPU DeepSpeed has none, so it is stood in for."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_lite.checkpoint import Reader
from megatron_lite.training.engine import Engine
from tests.training_case import Case


def engine(name: str, **scale: Any) -> Engine:
    """An engine with a wrapped optimizer, of which each kind has another name for the scale."""
    made = object.__new__(Engine)
    made.config = Case(precision="fp16").config()
    made.optimizer = SimpleNamespace(state={})
    made.deepspeed = SimpleNamespace(optimizer=SimpleNamespace(**{name: SimpleNamespace(**scale)}))
    return made


@pytest.mark.parametrize("old", ["loss_scaler", "loss_scale_config"])
@pytest.mark.parametrize("new", ["loss_scaler", "loss_scale_config"])
def test_it_comes_back_in_any_of_deepspeeds_optimizers(old: str, new: str) -> None:
    state = {"cur_scale": 1024.0, "cur_iter": 7, "last_overflow_iter": 3, "cur_hysteresis": 1}
    saved = engine(old, **state, scale_window=1000).state()
    assert saved["loss_scaler"] == state
    other = engine(
        new, cur_scale=65536.0, cur_iter=0, last_overflow_iter=-1, cur_hysteresis=2, scale_window=500
    )
    other.load_loss_scale(cast(Reader, SimpleNamespace(metadata={"engine": saved})))
    assert vars(getattr(other.deepspeed.optimizer, new)) == state | {"scale_window": 500}


def test_a_checkpoint_without_one_changes_nothing() -> None:
    made = engine("loss_scaler", cur_scale=65536.0, cur_iter=0)
    for metadata in ({}, {"engine": {"optimizer_steps": 3}}):
        made.load_loss_scale(cast(Reader, SimpleNamespace(metadata=metadata)))
    assert vars(made.deepspeed.optimizer.loss_scaler) == {"cur_scale": 65536.0, "cur_iter": 0}
