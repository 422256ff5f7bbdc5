"""The main job on CUDA devices, through its command line, against the same run on the CPU. Needs a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.data import IndexedDatasetWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents with something to learn: counting in bytes, with noise."""
    path = tmp_path_factory.mktemp("gpu") / "counting"
    rng = np.random.default_rng(0)
    lengths = rng.integers(40, 200, 200)
    documents = [(rng.integers(256) + np.arange(n) + rng.integers(0, 2, n)) % 256 for n in lengths]
    with IndexedDatasetWriter(str(path), np.uint16) as writer:
        writer.add_documents(np.concatenate(documents).astype(np.uint16), lengths)
    return str(path)


def run(prefix: str, folder: Path, *settings: str, ranks: int = 1) -> list[dict[str, float]]:
    """The metrics of one run of configs/tiny.json."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    sets = [
        f"data.train={prefix}",
        f"train.output_dir={folder}",
        f"train.exit_after_steps={STEPS}",
        *settings,
    ]
    command = [*launcher, "pretrain_gpt.py", "--config", "configs/tiny.json"]
    command += [word for setting in sets for word in ("--set", setting)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def on_cpu(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(run(prefix, tmp_path_factory.mktemp("cpu"), "train.device=cpu"))


def test_fp32_follows_the_cpu(prefix: str, on_cpu: list[float], tmp_path: Path) -> None:
    found = losses(run(prefix, tmp_path, "train.device=cuda"))
    assert found == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(
    prefix: str, on_cpu: list[float], tmp_path: Path, precision: str
) -> None:
    rows = run(prefix, tmp_path, "train.device=cuda", f"train.precision={precision}")
    skipped = sum(bool(row.get("skipped")) for row in rows)
    # fp16 begins with a loss scale that is too high on purpose; each skipped step halves it.
    assert skipped == 0 or precision == "fp16"
    assert losses(rows)[0] == pytest.approx(on_cpu[0], rel=5e-3)
    if not skipped:
        assert losses(rows) == pytest.approx(on_cpu, rel=2e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_follows_the_cpu(prefix: str, on_cpu: list[float], tmp_path: Path, stage: int) -> None:
    setting = f"deepspeed.zero_optimization.stage={stage}"
    assert losses(run(prefix, tmp_path, "train.device=cuda", setting)) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_two_gpus_follow_the_cpu(prefix: str, on_cpu: list[float], tmp_path: Path, layout: str) -> None:
    found = losses(run(prefix, tmp_path, "train.device=cuda", f"parallel.{layout}=2", ranks=2))
    assert found == pytest.approx(on_cpu, rel=1e-4)
