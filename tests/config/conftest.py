"""A small legal tree, and files made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tree() -> dict[str, Any]:
    return {
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64},
        "data": {"tokenizer": "byte"},
        "train": {"micro_batch_size": 2, "global_batch_size": 16, "steps": 20, "output_dir": "out"},
        "optimizer": {"lr": 0.001},
    }


@pytest.fixture
def small(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(content: object, name: str = "file.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return make
