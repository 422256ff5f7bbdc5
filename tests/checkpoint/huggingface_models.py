"""Small models of every family that is converted: transformers' own, and ours, with random weights."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

from megatron_lite.checkpoint import Piece, save  # noqa: E402
from megatron_lite.checkpoint.huggingface import rules  # noqa: E402
from megatron_lite.config import ModelConfig  # noqa: E402

LLAMA = {
    "position_embedding": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
}
LLAMA3_SCALING = {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
# What ours computes, by the family that an export has. 259 ids: the byte tokenizer's 257 and two more, padded to 384.
OURS = {
    "gpt2": {"activation": "gelu_tanh"},
    "gpt2-untied": {"tie_embeddings": False},
    "llama-gqa": LLAMA | {"num_query_groups": 2, "tie_embeddings": False},
    "llama3-tied": LLAMA | {"num_query_groups": 1, "rotary_scaling": LLAMA3_SCALING},
    "qwen2": LLAMA | {"add_qkv_bias": True, "num_query_groups": 2},
    "qwen3": LLAMA
    | {"qk_layernorm": True, "kv_channels": 16, "num_query_groups": 2, "tie_embeddings": False},
}


def ours(name: str, folder: Path, tokenizer: str | None = "byte", **changes) -> tuple[ModelConfig, Path]:
    """A checkpoint of a model of ours with nonzero vocabulary padding, as training of step 5 would leave it."""
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 64,
        "vocab_size": 259,
    }
    model = ModelConfig.model_validate(values | OURS[name] | changes)
    torch.manual_seed(2)
    pieces = []
    for rule in rules(model):
        weight = torch.randn(rule.shape) * 0.15 + (
            1.0 if "norm" in rule.name and rule.name.endswith("weight") else 0.0
        )
        if rule.held:
            pieces.append(Piece.whole(rule.name, "weight", weight))
    config = {
        "model": model.model_dump(mode="json"),
        "data": {"tokenizer": tokenizer},
        "train": {"micro_batch_size": 1, "global_batch_size": 1, "steps": 5, "output_dir": str(folder)},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
    }
    return model, save(folder / "checkpoints", 5, pieces, {"config": config})
