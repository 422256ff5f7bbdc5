"""What every import leaves: a checkpoint in SAVE/checkpoints, and SAVE/config.json, of a run that begins with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import write_json
from megatron_lite.checkpoint.layout import Piece
from megatron_lite.checkpoint.store import save_files
from megatron_lite.config import ModelConfig

CONFIG = "config.json"


def starting_config(
    source: Path,
    target: Path,
    model: ModelConfig,
    *,
    precision: str,
    tokenizer: str | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """A configuration that loads: the model's, the tokenizer's, and the least that training asks for.

    step: that training goes on from; None: weights alone are there, and it begins with them
    """
    target = target.resolve()
    what = "with the weights" if step is None else f"from step {step}"
    named = "data: --set data.train=PREFIX"
    if tokenizer is None:
        named = "data and their tokenizer: --set data.train=PREFIX --set data.tokenizer=SPEC"
    return {
        "description": f"Training {what} of {source}. Name the {named}; and set train.steps, the batch sizes, "
        "optimizer.lr and, for shorter samples, model.seq_length as you need them",
        "model": model.model_dump(mode="json"),
        "data": {"tokenizer": tokenizer},
        "train": {
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "steps": (step or 0) + 1,
            # Of its own, so that retention never takes what was imported.
            "output_dir": str(target / "run"),
            "precision": precision,
        },
        "optimizer": {"lr": 1e-5, "schedule": "constant"},
        "checkpoint": {"load": str(target), "weights_only": step is None},
    }


def save_import(
    target: Path, step: int, pieces: list[Piece], metadata: dict[str, Any], tree: dict[str, Any] | None
) -> Path:
    """Write a checkpoint under `target`/checkpoints, as a run's would be, then `tree`; the step folder.

    tree: for `target`/config.json; None: the user has a configuration

    Raises CheckpointError where `target` holds one of them already, or has too little room.
    """
    # Maybe that of the Hugging Face folder itself.
    if tree is not None and (target / CONFIG).exists():
        raise CheckpointError(f"{target / CONFIG} is there already; give another folder")
    folder = save_files(target, step, [pieces], metadata)
    if tree is not None:
        write_json(target / CONFIG, tree)
    return folder
