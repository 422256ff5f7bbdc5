"""The benchmarks run to the end, fill their tables, and compare the same model; nothing is said of how fast."""

import json
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

from benchmarks.plain_gpt import PlainGPT, PlainTrainer, take_weights
from megatron_lite.config import Config, build_config
from megatron_lite.data.loader import Batch
from megatron_lite.ops.registry import GROUPS
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


def run(script: str, *arguments: str, status: int = 0) -> str:
    """What a script printed: its output, and where it fails on purpose its errors, too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + (done.stderr if status else "")


def tables(output: str) -> list[list[dict[str, str]]]:
    """Each table's rows, as cells by title (a title that comes twice: its first)."""
    found: list[list[dict[str, str]]] = []
    titles: list[str] | None = None
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| "):
            titles = None
        elif titles is None:
            titles = cells
            found.append([])
        elif cells[0] != "---":
            found[-1].append(dict(reversed(list(zip(titles, cells, strict=True)))))
    return found


def numbers(cell: str) -> tuple[float, float, float]:
    """Median, least and most."""
    found = re.fullmatch(SPREAD, cell)
    assert found, cell
    middle, low, high = map(float, found.groups())
    assert 0 <= low <= middle <= high
    return middle, low, high


def check_header(output: str, *more: str) -> None:
    for key in ("date", "machine", "versions", "turns", "command", *more):
        assert re.search(rf"^- {key}: \S", output, re.MULTILINE), output
    assert torch.__version__ in output


@pytest.mark.slow
def test_step() -> None:
    output = run("step.py", *TINY, "--no-compile")
    check_header(output, "model", "batch")
    fp32, bf16 = tables(output)
    plain = "plain PyTorch, {}".format
    ours = "megatron_lite, {}".format
    off = ", kernels.cpu_allocator=false"
    assert [row["side"] for row in fp32] == [ours("fp32"), plain("fp32"), ours("fp32") + off]
    assert [row["side"] for row in bf16] == [ours("bf16"), plain("bf16"), plain("fp32"), ours("bf16") + off]
    for table, baselines in ((fp32, ["fp32"]), (bf16, ["fp32", "bf16"])):
        for row in table:
            numbers(row["tokens/s"])
            assert float(row["peak MiB"]) > 50  # a process that imported torch
            for kind in baselines:
                ratio = numbers(row[f"speed / {plain(kind)}"])
                assert (ratio == (1, 1, 1)) == (row["side"] == plain(kind))


def test_presets_load_and_have_a_plain_model() -> None:
    code = (
        "import step, torch; from bare import ROOT; from plain_gpt import PlainGPT\n"
        "from megatron_lite.config import load_config\n"
        "torch.set_default_device('meta')\n"
        "for presets in step.PRESETS.values():\n"
        "    for name, preset in presets.items():\n"
        "        config = load_config(ROOT / preset.config, preset.overrides, world_size=1)\n"
        "        PlainGPT(config.model)\n"
        "        print(f'{name}: {config.model.parameter_count() / 1e6:.0f}')\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = {name: int(millions) for name, millions in (line.split(": ") for line in said.splitlines())}
    assert found["shakespeare_char"] == 11 and 80 < found["768 wide"] < 100
    for millions in (125, 350):
        assert 0.98 < found[f"GPT {millions}M"] / millions < 1.05
    assert 1250 < found["GPT 1.3B"] < 1350
    assert found["8 blocks of Llama 3 8B"] == round(8 * 218.1 + 2 * 4.096 * 32)


@pytest.mark.slow
def test_step_without_deepspeed_and_with_compile() -> None:
    (rows,) = tables(run("step.py", *TINY, "--precision", "fp32", "--loop"))
    assert [row["side"] for row in rows] == [
        "megatron_lite, fp32 (no DeepSpeed: plain loop)",
        "plain PyTorch, fp32",
        "plain PyTorch, fp32, torch.compile",
    ]


@pytest.mark.slow
def test_parallel() -> None:
    output = run("parallel.py", *TINY)
    check_header(output, "model", "batch")
    (rows,) = tables(output)
    assert [row["side"] for row in rows] == [
        "1 rank",
        "TP2",
        "TP2 + sequence parallel",
        "PP2",
        "DP2, ZeRO-1",
        "DP2, ZeRO-2",
        "DP2, ZeRO-3",
        "TP2 x PP2",
    ]
    for row in rows:
        assert numbers(row["tokens/s"])[1] > 0 and float(row["peak MiB of a rank"]) > 50
        assert (numbers(row["speed / 1 rank"]) == (1, 1, 1)) == (row["side"] == "1 rank")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--set", "model.num_layer=2"), 2, "did you mean model.num_layers"),
        (("--set", "model.normalization=RMSNorm"), 1, "the plain model is GPT-2's"),
    ],
)
def test_bad_settings_end_it(arguments: tuple[str, ...], status: int, said: str) -> None:
    assert said in run("step.py", *TINY, *arguments, "--precision", "fp32", status=status)


# ------------------------------------------------------------------------------------- the operations


def test_every_operation_is_measured() -> None:
    used = {name for line in run("ops.py", "--list").splitlines() for name in line.partition(": ")[2].split()}
    assert used == {name for names in GROUPS.values() for name in names}


@pytest.mark.slow
def test_ops() -> None:
    output = run("ops.py", "--sizes", "tiny", "--rounds", "2", "--no-compile")
    check_header(output)
    assert re.findall(r"^#### (\w+)$", output, re.MULTILINE) == ["fp32", "bf16"]
    listed = [line.partition(": ")[0] for line in run("ops.py", "--list").splitlines()]
    for table in tables(output):
        assert [row["operation"] for row in table] == listed
        for row in table:
            assert numbers(row["plain ms"])[1] > 0 and numbers(row["ours ms"])[1] > 0
            numbers(row["plain / ours"])
            assert row["compile ms"] == row["compile / ours"] == "-"
            assert row["backend"] and float(row["MiB plain"]) >= 0 and row["roof"].endswith("%")


@pytest.mark.slow
def test_ops_under_compile_and_their_memory() -> None:
    """Of the size of a real model, since a tiny operation's memory is below what a page can show."""
    output = run(
        "ops.py", "--sizes", "cpu", "--quick", "--only", "add_rms", "--dtype", "fp32", "--threads", "2"
    )
    ((row,),) = tables(output)
    assert numbers(row["compile ms"])[1] > 0
    # 2048 x 768 in fp32 is 6 MiB. Forward gives two such tensors, backward two more, which ours may share.
    assert 12 <= float(row["MiB plain"]) < 100


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    """The plain GELU is off by a factor here; ours is not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.nn.functional as F\nright = F.gelu\nF.gelu = lambda *a, **k: 1.01 * right(*a, **k)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "benchmarks/ops.py"),
        "--sizes",
        "tiny",
        "--only",
        "gelu",
        "--no-compile",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 1 and "FAILED: gelu, tiny, fp32: gelu" in done.stdout, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------- the curves


@pytest.mark.slow
def test_curve(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    small = [("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2), ("seq_length", 16)]
    sets = [word for key, value in small for word in ("--set", f"model.{key}={value}")]
    arguments = ("--text", str(text), "--steps", "6", "--window", "2", *sets)
    output = run("curve.py", *arguments)
    check_header(output, "model", "batch", "text")
    (rows,) = tables(output)
    sides = ["megatron_lite, fp32", "megatron_lite, bf16", "plain PyTorch, fp32"]
    assert [row["step"] for row in rows] == ["2", "4", "6", "seconds"]
    assert all(float(row[side]) > 0 for row in rows[:-1] for side in sides)
    assert len(re.findall(r"^- largest difference of .*: \d+\.\d+%$", output, re.MULTILINE)) == 3
    assert "largest difference" in run("curve.py", *arguments, "--limit", "0", "--no-plain", status=1)


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


def both(config: Config) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(loss, gradient norm) of each step of ours and of the plain model, from the same weights."""
    engine = make_engine(config)
    plain = PlainGPT(config.model)
    take_weights(plain, dict(engine.named_parameters()), config.model)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 61, (4, 17))
    inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    mask = np.ones((2, 16), np.float32)
    batches = [Batch(inputs[i : i + 2], labels[i : i + 2], mask, None, None) for i in (0, 2)]
    trainer = PlainTrainer(plain, config)
    pairs = [(torch.from_numpy(b.tokens), torch.from_numpy(b.labels)) for b in batches]
    ours, theirs = [], []
    for number in range(STEPS):
        engine.set_learning_rate(learning_rate(config, number))
        result = engine.train_step(batches, number)
        ours.append((result.loss, result.grad_norm))
        loss, norm = trainer.step(pairs)
        theirs.append((float(loss), float(norm)))
    return ours, theirs


GPT2: dict[str, Any] = {}
LLAMA: dict[str, Any] = {
    "position_embedding": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "num_query_groups": 2,
    "add_bias_linear": False,
    "tie_embeddings": False,
}


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_both_sides_train_the_same_model(precision: str, bound: float, model: dict[str, Any]) -> None:
    config = build_config(
        CONFIG | {"model": CONFIG["model"] | model, "train": CONFIG["train"] | {"precision": precision}}
    )
    ((ours, theirs),) = run_ranks(1, both, config)
    assert theirs[-1][0] < theirs[0][0] - 0.1 and not math.isnan(theirs[-1][0])
    np.testing.assert_allclose(ours, theirs, rtol=bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loop_without_deepspeed_trains_the_same_model(precision: str) -> None:
    """The plain loop against the engine: a subprocess, as benchmarks import one another by their bare names."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LOOP,
            json.dumps(CONFIG | {"train": CONFIG["train"] | {"precision": precision}}),
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    loop, engine = (np.array(found) for found in json.loads(done.stdout.splitlines()[-1]))
    assert engine[-1, 0] < engine[0, 0] - 0.1
    np.testing.assert_allclose(loop, engine, rtol=1e-5 if precision == "fp32" else 1e-2)


LOOP = f"""
import json, sys
import torch
from ours import Loop, as_batches, make_engine, random_batches
from megatron_lite.config import build_config
config = build_config(json.loads(sys.argv[1]))
pairs = random_batches(config)
loop, engine = Loop(config, torch.device("cpu")), make_engine(0, "", config, 1, "cpu")
engine.set_learning_rate(config.optimizer.lr)
found = [[], []]
for number in range({STEPS}):
    loss, norm = loop.step(pairs)
    found[0].append((float(loss), float(norm)))
    result = engine.train_step(as_batches(pairs), number)
    found[1].append((result.loss, result.grad_norm))
print(json.dumps(found))
"""
