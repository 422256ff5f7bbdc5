"""One small training run, on any layout: what the parity and resume tests compare."""

import contextlib
import importlib
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lite.checkpoint import DamagedCheckpoint
from megatron_lite.config import Config, build_config
from megatron_lite.data.loader import Batch
from megatron_lite.model.runtime import DTYPES, Runtime
from megatron_lite.ops import Needs, build_ops
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.training.engine import Engine, build_engine
from megatron_lite.training.saving import find_start, load_checkpoint
from megatron_lite.training.schedule import learning_rate
from tests.distributed import run_ranks

GPT2 = {"position_embedding": "learned_absolute", "normalization": "LayerNorm", "activation": "gelu_tanh"}
LLAMA = {
    "position_embedding": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "num_query_groups": 4,
    "num_attention_heads": 8,
}


@dataclass(frozen=True)
class Case:
    """A layout and a style; everything else is the same in all cases."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    sequence: bool = False
    style: str = "gpt2"
    tied: bool = True
    recompute: str = "none"
    precision: str = "fp32"
    steps: int = 10
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}", f"z{self.zero}", self.style]
        parts += ["sp"] * self.sequence + ["untied"] * (not self.tied)
        parts += [self.recompute] * (self.recompute != "none") + [self.precision] * (self.precision != "fp32")
        return "-".join([*parts, *(f"{k}={v}" for k, v in (self.model | self.settings).items())])

    def __hash__(self) -> int:
        return hash(str(self))

    def config(self) -> Config:
        style = GPT2 if self.style == "gpt2" else LLAMA
        model = {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 16,
            "vocab_size": 61,
            "make_vocab_size_divisible_by": 8,
            "tie_embeddings": self.tied,
            **style,
            **self.model,
        }
        tree: dict[str, Any] = {
            "model": model,
            "parallel": {
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "sequence_parallel": self.sequence,
            },
            "data": {"train": "unused"},
            "train": {
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "steps": 10,
                "precision": self.precision,
                "recompute": self.recompute,
                "output_dir": "unused",
            },
            "optimizer": {"lr": 0.002, "warmup_steps": 2, "weight_decay": 0.1, "grad_clip": 0.5},
            # Tiny parameters are otherwise never partitioned by ZeRO-3.
            "deepspeed": {
                "zero_optimization": {"stage": self.zero}
                | ({"stage3_param_persistence_threshold": 0} if self.zero == 3 else {})
            },
        }
        for path, value in self.settings.items():
            node = tree
            *parents, last = path.split(".")
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = value
        return build_config(tree)


def global_batch(step: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [G, S+1] and mask [G, S] of one step; with `eod_mask_loss` some tokens are masked, unevenly."""
    rng = np.random.default_rng((7, step))
    samples, length = config.train.global_batch_size, config.model.seq_length
    assert config.model.vocab_size is not None
    # Tokens follow a rule with noise, so that there is something to learn and gradients are not all noise.
    start = rng.integers(0, config.model.vocab_size, (samples, 1))
    tokens = (
        start + 3 * np.arange(length + 1) + rng.integers(0, 2, (samples, length + 1))
    ) % config.model.vocab_size
    mask = np.ones((samples, length), dtype=np.float32)
    if config.data.eod_mask_loss:
        for row in range(samples):
            mask[row, rng.integers(2, length) :] = 0
    return tokens.astype(np.int64), mask


def rank_batches(step: int, config: Config, data_rank: int, data_size: int) -> list[Batch]:
    """This data-parallel rank's micro-batches, in the loader's order."""
    tokens, mask = global_batch(step, config)
    size, out = config.train.micro_batch_size, []
    for micro in range(config.train.global_batch_size // (size * data_size)):
        rows = slice((micro * data_size + data_rank) * size, (micro * data_size + data_rank + 1) * size)
        part = tokens[rows]
        inputs, labels = np.ascontiguousarray(part[:, :-1]), np.ascontiguousarray(part[:, 1:])
        eod = inputs % 11 == 0
        segments = np.cumsum(eod, axis=1, dtype=np.int32) - eod.astype(np.int32)
        starts = np.maximum.accumulate(
            np.where(np.pad(eod[:, :-1], ((0, 0), (1, 0))), np.arange(inputs.shape[1]), 0), axis=1
        )
        positions = np.arange(inputs.shape[1]) - starts
        out.append(
            Batch(
                inputs,
                labels,
                mask[rows],
                positions.astype(np.int64) if config.data.reset_position_ids else None,
                segments if config.data.reset_attention_mask else None,
            )
        )
    return out


def load_start(engine: Engine) -> Path | None:
    """Loads what a run of the engine's configuration starts from, as `training.loop.start` does; its folder."""
    starts, fault = find_start(engine.config), None
    while (path := starts.send(fault)) is not None:
        try:
            load_checkpoint(engine, path)
        except DamagedCheckpoint as error:
            fault = str(error)
        else:
            break
    return path


def make_engine(config: Config) -> Engine:
    """The engine of this rank, on the process group that is there."""
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence_parallel)
    runtime = Runtime(
        mesh=mesh,
        ops=build_ops(config.kernels, Needs.of(config, torch.device("cpu"), DTYPES[config.train.precision])),
        dtype=DTYPES[config.train.precision],
        seed=config.train.seed,
        recompute=config.train.recompute,
    )
    return build_engine(config, runtime)


def train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """(loss, grad norm) of each step."""
    out = []
    for step in steps:
        engine.set_learning_rate(learning_rate(engine.config, step))
        batches = rank_batches(step, engine.config, engine.mesh.data_rank, engine.mesh.data_size)
        result = engine.train_step(batches, step)
        out.append((result.loss, result.grad_norm))
    return out


def run_case(case: Case) -> list[tuple[float, float]]:
    """The whole run of a case on this rank."""
    return train(make_engine(case.config()), range(case.steps))


def _train_and_list_modules(case: Case) -> list[str]:
    run_case(case)
    return list(sys.modules)


@cache
def import_what_ranks_import() -> None:
    """torch and DeepSpeed import half of themselves when first used: done here once, not in every forked rank."""
    (names,) = run_ranks(1, _train_and_list_modules, Case(zero=3, steps=1))
    for name in names:  # in the order of the rank: another one meets modules that import each other half done
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run(case: Case) -> list[list[tuple[float, float]]]:
    """The whole run of a case on ranks of its own: for each of them, (loss, grad norm) of each step."""
    import_what_ranks_import()
    return run_ranks(case.world_size, run_case, case)
