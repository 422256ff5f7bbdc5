"""What a run reports."""

import json
import logging
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.training.metrics import Metrics, peak_tflops
from tests.training_case import Case

CPU = torch.device("cpu")


def make(folder: Path, start: int = 0, active: bool = True, world_size: int = 1, **logging_: Any) -> Metrics:
    settings = {"train.output_dir": str(folder), "train.steps": 100}
    config = Case(settings=settings | {f"logging.{key}": value for key, value in logging_.items()}).config()
    metrics = Metrics(config, CPU, world_size, active)
    metrics.open(start)
    return metrics


def report(
    metrics: Metrics, *steps: int, loss: float = 2.5, norm: float = 0.125, skipped: bool = False
) -> None:
    for step in steps:
        metrics.begin_step()
        metrics.end_step(step, loss, norm, 0.001, 128 * step, skipped)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_a_step_in_full_precision(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    loss = 5.123456789012345
    report(metrics, 1, loss=loss)
    (row,) = rows(tmp_path)  # before closing: a kill must not lose it
    assert (row["step"], row["loss"], row["grad_norm"]) == (1, loss, 0.125)
    assert (row["lr"], row["tokens"]) == (0.001, 128)
    assert row["tokens_per_second"] == pytest.approx(8 * 16 / row["step_seconds"])
    per_token = metrics.config.model.flops_per_token()
    assert row["tflops_per_device"] == pytest.approx(row["tokens_per_second"] * per_token / 1e12)
    assert "skipped" not in row and "mfu" not in row
    metrics.close()


def test_several_devices_share_the_work(tmp_path: Path) -> None:
    metrics = make(tmp_path, world_size=4, peak_tflops=2e-6)
    report(metrics, 1)
    (row,) = rows(tmp_path)
    per_token = metrics.config.model.flops_per_token()
    assert row["tflops_per_device"] == pytest.approx(row["tokens_per_second"] * per_token / 4 / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops_per_device"] / 2e-6)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    report(metrics, 1, loss=math.nan, norm=math.inf, skipped=True)
    metrics.evaluation(1, "valid", 800.0, 0.1)
    step, evaluation = rows(tmp_path)
    assert (step["loss"], step["grad_norm"], step["skipped"]) == (None, None, True)
    assert (evaluation["valid_loss"], evaluation["valid_perplexity"]) == (800.0, None)
    for word in ("NaN", "Infinity"):
        assert word not in (tmp_path / "metrics.jsonl").read_text(), "no JSON reader but Python's takes that"


def test_evaluation_row(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    metrics.evaluation(7, "valid", 1.5, 0.1)
    assert rows(tmp_path) == [{"step": 7, "valid_loss": 1.5, "valid_perplexity": math.exp(1.5)}]


def test_resuming_drops_the_rows_of_steps_done_again(tmp_path: Path) -> None:
    metrics = make(tmp_path)
    report(metrics, 1, 2)
    metrics.evaluation(2, "valid", 1.5, 0.1)
    report(metrics, 3, 4)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a kill cut it short
    metrics = make(tmp_path, start=2)
    assert [(row["step"], "valid_loss" in row) for row in rows(tmp_path)] == [
        (1, False),
        (2, False),
        (2, True),
    ]
    report(metrics, 3, loss=9.0)
    assert [row.get("loss") for row in rows(tmp_path)] == [2.5, 2.5, None, 9.0]
    make(tmp_path, start=0)
    assert rows(tmp_path) == []


def test_until_a_run_begins_nothing_is_dropped(tmp_path: Path) -> None:
    report(make(tmp_path), 1)
    Metrics(make(tmp_path, start=1).config, CPU, 1, active=True)
    assert len(rows(tmp_path)) == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = make(tmp_path / "new", active=False, tensorboard=True)
    report(metrics, 1)
    metrics.evaluation(1, "valid", 1.0, 0.1)
    metrics.close()
    assert not (tmp_path / "new").exists()


def test_console_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = make(tmp_path, interval=10, peak_tflops=1.0)
    with caplog.at_level(logging.INFO):
        report(metrics, 1, 10, 15)
        report(metrics, 100, skipped=True)
    first, last = caplog.messages
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"step  10/100 \( 10%\) \| loss 2\.5000 \| grad norm 0\.125 \| lr 1\.00e-03 \| {number}[kMG]? tokens/s \| "
        rf"{number} TFLOP/s a device \| MFU {number}% \| left 0s",
        first,
    )
    assert last.startswith("step 100/100 (100%)") and last.endswith(" | SKIPPED")


def test_tensorboard_files(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = make(tmp_path, tensorboard=True)
    report(metrics, 1, 2, loss=math.nan)
    report(metrics, 3)
    metrics.evaluation(3, "valid", 1.5, 0.1)
    metrics.close()
    events = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    assert [event.step for event in events.Scalars("grad_norm")] == [1, 2, 3]
    assert [(event.step, event.value) for event in events.Scalars("valid_loss")] == [(3, 1.5)]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: a run resumed is the same run, one in another folder of the same name is not."""
    calls: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((row, step)), finish=lambda: None)
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    wandb.init = lambda **arguments: calls.append(arguments) or run  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("a/run", "a/run", "b/run"):
        metrics = make(tmp_path / folder, wandb_project="project")
        report(metrics, 1, loss=math.nan)
        metrics.close()
    assert [call["project"] for call in calls] == ["project"] * 3
    assert [call["name"] for call in calls] == ["run"] * 3
    first, again, other = (call["id"] for call in calls)
    assert first == again != other
    assert logged[0][1] == 1 and "loss" not in logged[0][0] and logged[0][0]["grad_norm"] == 0.125


def test_peak_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = make(tmp_path).config, torch.device("cuda")
    assert peak_tflops(config, CPU) is None
    for name, peak in {
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H200": 989.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "Something New": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(config, cuda) == peak
    assert peak_tflops(make(tmp_path, peak_tflops=100.0).config, cuda) == 100.0
