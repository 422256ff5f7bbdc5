"""Small models with random weights, and checkpoints of them, for the tests of generation."""

from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint import Piece, save
from megatron_lite.config import Config
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import spec_of
from tests.training_case import Case

STYLES = ("gpt2", "llama")
PROMPTS = [[5, 17, 3], [44], [60, 0, 9, 9, 21, 8, 33]]
# Weights so large that the tokens differ from place to place, and none is chosen by a hair.
LOUD = {"init_method_std": 0.3}


def make_config(style: str, **model: Any) -> Config:
    """A model of 61 tokens (64 with padding) and 4 blocks; learned positions: 32."""
    return Case(style=style, model={"seq_length": 32, **LOUD, **model}, tied=False).config()


def make_model(config: Config, mesh: Mesh | None = None, seed: int = 7) -> GPT:
    return GPT(config.model, Runtime(mesh or Mesh(), seed=seed)).eval()


def save_model(model: GPT, config: Config, folder: Path, step: int = 3) -> Path:
    """A checkpoint of a model held by one process, weights only."""
    pieces = [Piece.whole(spec_of(p).name, "weight", p.detach()) for p in model.parameters()]
    return save(folder / "checkpoints", step, pieces, {"config": config.model_dump(mode="json")})


@torch.no_grad()
def recompute_greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache, one row: the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]))[0, -1, : model.config.vocab_size]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
