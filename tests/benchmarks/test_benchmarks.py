"""The benchmarks run to the end, fill their tables, and compare the same model; nothing is said of how fast."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.plain_gpt import PlainGPT, plain_step
from megatron_lite.config import Config, build_config
from megatron_lite.data.loader import Batch
from megatron_lite.training.schedule import learning_rate
from tests.distributed import run_ranks
from tests.training_case import make_engine

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--config",
    str(ROOT / "configs/tiny.json"),
    *("--set", "model.num_layers=2", "--set", "model.hidden_size=16", "--set", "model.seq_length=8"),
    *("--rounds", "2", "--steps", "1"),
]
SPREAD = r"([\d.]+) \(([\d.]+) - ([\d.]+)\)"


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *TINY, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(output: str) -> list[list[str]]:
    """The cells of the table rows, without the headings."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("side", "---")]


def check_row(row: list[str], is_baseline: bool) -> None:
    _, speed, ratio, peak = row
    for cell in (speed, ratio):
        found = re.fullmatch(SPREAD, cell)
        assert found, cell
        middle, low, high = map(float, found.groups())
        assert 0 < low <= middle <= high
    if is_baseline:
        assert ratio == "1.000 (1.000 - 1.000)"
    assert float(peak) > 50  # a process that imported torch


def check_header(output: str) -> None:
    for key in ("date", "machine", "versions", "model", "batch", "turns", "command"):
        assert re.search(rf"^- {key}: \S", output, re.MULTILINE), output
    assert torch.__version__ in output


@pytest.mark.slow
def test_step() -> None:
    output = run("step.py")
    check_header(output)
    assert re.findall(r"^(fp32|bf16)$", output, re.MULTILINE) == ["fp32", "bf16"]
    found = rows(output)
    names = ["megatron_lite", "plain PyTorch", "megatron_lite, kernels.cpu_allocator=false"]
    assert [row[0] for row in found] == names * 2
    for row in found:
        check_row(row, row[0] == "plain PyTorch")


@pytest.mark.slow
def test_parallel() -> None:
    output = run("parallel.py")
    check_header(output)
    found = rows(output)
    assert [row[0] for row in found] == [
        "1 rank",
        "TP2",
        "TP2 + sequence parallel",
        "PP2",
        "DP2, ZeRO-1",
        "DP2, ZeRO-2",
        "DP2, ZeRO-3",
        "TP2 x PP2",
    ]
    for row in found:
        check_row(row, row[0] == "1 rank")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--set", "model.num_layer=2"), 2, "did you mean model.num_layers"),
        (("--set", "model.normalization=RMSNorm"), 1, "the plain model is GPT-2's"),
    ],
)
def test_bad_settings_end_it(arguments: tuple[str, ...], status: int, said: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), *TINY, *arguments, "--precision", "fp32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == status
    assert said in done.stderr


# ------------------------------------------------------------------------------------- the same model

CONFIG: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 61,
        "make_vocab_size_divisible_by": 1,
        "activation": "gelu",
    },
    "data": {"train": "unused"},
    "train": {"micro_batch_size": 2, "global_batch_size": 4, "steps": 10, "output_dir": "unused"},
    "optimizer": {"lr": 0.002, "schedule": "constant", "grad_clip": 0.5},
}
STEPS = 5


@torch.no_grad()
def copy_weights(plain: PlainGPT, ours: dict[str, Tensor], heads: int) -> None:
    """Ours lays query, key and value out head by head, the plain model all queries first."""

    def projection(name: str) -> Tensor:
        tensor = ours[name]
        size = tensor.size(0) // (3 * heads)
        return tensor.unflatten(0, (heads, 3, size)).transpose(0, 1).flatten(0, 2)

    plain.wte.weight.copy_(ours["embed.weight"])
    plain.wpe.weight.copy_(ours["position.weight"])
    for kind in ("weight", "bias"):
        getattr(plain.ln_f, kind).copy_(ours[f"norm.{kind}"])
        for number, block in enumerate(plain.blocks):
            name = f"blocks.{number}"
            getattr(block.c_attn, kind).copy_(projection(f"{name}.attention.linear_qkv.{kind}"))
            pairs = {
                "ln_1": "input_layernorm",
                "c_proj": "attention.linear_proj",
                "ln_2": "pre_mlp_layernorm",
                "c_fc": "mlp.linear_fc1",
                "mlp_proj": "mlp.linear_fc2",
            }
            for theirs, own in pairs.items():
                getattr(getattr(block, theirs), kind).copy_(ours[f"{name}.{own}.{kind}"])


def both(config: Config) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(loss, gradient norm) of each step of ours and of the plain model, from the same weights."""
    engine = make_engine(config)
    plain = PlainGPT(config.model)
    weights = {name: parameter.detach() for name, parameter in engine.named_parameters()}
    copy_weights(plain, weights, config.model.num_attention_heads)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 61, (4, 17))
    inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    mask = np.ones((2, 16), np.float32)
    batches = [Batch(inputs[i : i + 2], labels[i : i + 2], mask, None, None) for i in (0, 2)]
    step = plain_step(
        plain, config, [(torch.from_numpy(b.tokens), torch.from_numpy(b.labels)) for b in batches]
    )
    ours, theirs = [], []
    for number in range(STEPS):
        engine.set_learning_rate(learning_rate(config, number))
        result = engine.train_step(batches, number)
        ours.append((result.loss, result.grad_norm))
        loss, norm = step()
        theirs.append((float(loss), float(norm)))
    return ours, theirs


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_both_sides_train_the_same_model(precision: str, bound: float) -> None:
    config = build_config(CONFIG | {"train": CONFIG["train"] | {"precision": precision}})
    ((ours, theirs),) = run_ranks(1, both, config)
    assert theirs[-1][0] < theirs[0][0] - 0.1 and not math.isnan(theirs[-1][0])
    np.testing.assert_allclose(ours, theirs, rtol=bound)
