"""From a Hugging Face folder to a checkpoint, one parameter in memory at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import Deferred
from megatron_lite.checkpoint.huggingface.config import from_huggingface
from megatron_lite.checkpoint.huggingface.folder import CONFIG, GENERATION_CONFIG, Folder, read_json
from megatron_lite.checkpoint.huggingface.tokenizer import load_fitting, tokenizer_of
from megatron_lite.checkpoint.huggingface.weights import Rule, rules
from megatron_lite.checkpoint.index import TOKENIZER
from megatron_lite.checkpoint.layout import Piece
from megatron_lite.checkpoint.starting import save_import, starting_config
from megatron_lite.config import build_config
from megatron_lite.tokenizers import TokenizerError

log = logging.getLogger(__name__)


def import_huggingface(source: Path, target: Path) -> Path:
    """Write the Hugging Face folder `source` as a checkpoint of step 0, weights only; its step folder.

    It is under `target`/checkpoints, as a run's would be. Weights keep their dtype. `target`/config.json is for a run
    that begins with them: it names the folder's tokenizer, and only the data are missing. The fingerprint of this
    tokenizer is kept where it can be read and has no more ids than the model.

    Raises CheckpointError for a model that we do not compute (with the reason), for quantized and pickled weights, for
    tensors that are missing, of another shape, or not accounted for; where `target` has a config.json already.
    """
    theirs = read_json(source / CONFIG)
    model = from_huggingface(theirs)
    folder = Folder(source, model)
    held = [rule for rule in rules(model) if rule.held]
    folder.check(held)
    generation = source / GENERATION_CONFIG
    dtype = folder.get(held[0].huggingface[0]).dtype
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    tokenizer = tokenizer_of(source.resolve())
    tree = starting_config(source, target, model, precision=precision, tokenizer=tokenizer)
    try:
        config = build_config(tree, str(source / CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{source / CONFIG}: no configuration of ours: {error}") from error
    metadata: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "progress": {"step": 0, "consumed_samples": 0, "consumed_tokens": 0},
        # For an export of what was imported: what only Hugging Face's tools read.
        "huggingface": {
            "config": theirs,
            "generation_config": read_json(generation) if generation.is_file() else None,
        },
    }
    if tokenizer is not None:
        try:
            # As a run has it whose settings name this tokenizer; with another one it warns.
            metadata[TOKENIZER] = load_fitting(tokenizer, model).fingerprint()
        except TokenizerError as error:
            log.warning("the folder's tokenizer cannot be used: %s", error)
    return save_import(target, 0, [_piece(rule, folder) for rule in held], metadata, tree)


def _piece(rule: Rule, folder: Folder) -> Piece:
    def load() -> torch.Tensor:
        return folder.parameter(rule).reshape(-1)

    numel = torch.Size(rule.shape).numel()
    data = Deferred(folder.get(rule.huggingface[0]).dtype, (numel,), load)
    return Piece(rule.name, "weight", rule.shape, None, 0, 0, 0, data)
