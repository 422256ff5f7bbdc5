"""Checkpoints to Hugging Face folders and back, one parameter in memory at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import Deferred, write_atomically, write_safetensors
from megatron_lite.checkpoint.huggingface.config import from_huggingface, to_huggingface
from megatron_lite.checkpoint.huggingface.weights import Rule, rules
from megatron_lite.checkpoint.layout import Piece
from megatron_lite.checkpoint.reader import Reader
from megatron_lite.checkpoint.store import save
from megatron_lite.config import ModelConfig, build_config

log = logging.getLogger(__name__)

CONFIG = "config.json"
SINGLE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
# Buffers that old releases of transformers saved beside the weights: made anew from the configuration.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def model_config(reader: Reader) -> ModelConfig:
    """The model section that a checkpoint was saved with."""
    try:
        section = reader.metadata["config"]["model"]
    except KeyError:
        raise CheckpointError(
            f"{reader.path}: its metadata holds no config.model, so it cannot be converted"
        ) from None
    return ModelConfig.model_validate_json(json.dumps(section))


def export_huggingface(source: Path, target: Path, *, shard_bytes: int = 5_000_000_000) -> ModelConfig:
    """Write the weights of the step folder `source` as a Hugging Face folder; the model's configuration.

    Files hold up to `shard_bytes` bytes each, as on the Hub. Raises CheckpointError where no Hugging Face
    family computes the model, where `target` holds weights already, or where the checkpoint is damaged.
    """
    with Reader(source) as reader:
        model = model_config(reader)
        dtype = reader.dtype("embed.weight")
        config = to_huggingface(model, str(dtype).removeprefix("torch."))
        tensors: dict[str, torch.Tensor | Deferred] = {}
        for rule in rules(model):
            _check_shape(rule, reader)
            for part, (name, shape) in enumerate(zip(rule.huggingface, rule.shapes(), strict=True)):
                tensors[name] = _deferred(rule, part, shape, reader, dtype)
        target.mkdir(parents=True, exist_ok=True)
        if list(target.glob("*.safetensors")):
            raise CheckpointError(f"{target} holds safetensors files already; give an empty folder")
        _write_shards(target, tensors, shard_bytes)
    write_atomically(target / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return model


def _check_shape(rule: Rule, reader: Reader) -> None:
    if rule.held and reader.shape(rule.name) != rule.shape:
        shape = reader.shape(rule.name)
        raise CheckpointError(f"{reader.path}: {rule.name} is {shape}, its config.model says {rule.shape}")


def _deferred(rule: Rule, part: int, shape: tuple[int, ...], reader: Reader, dtype: torch.dtype) -> Deferred:
    def load() -> torch.Tensor:
        return (
            rule.to_huggingface(reader.read(rule.name))[part]
            if rule.held
            else torch.zeros(shape, dtype=dtype)
        )

    return Deferred(reader.dtype(rule.name) if rule.held else dtype, shape, load)


def _write_shards(target: Path, tensors: dict[str, torch.Tensor | Deferred], shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor | Deferred]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + size, total + size
    if len(shards) == 1:
        write_safetensors(target / SINGLE, shards[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(target / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(target / SHARD_INDEX, (json.dumps(index, indent=2) + "\n").encode())


def import_huggingface(source: Path, target: Path) -> Path:
    """Write the Hugging Face folder `source` as a checkpoint of step 0, weights only; its step folder.

    It is under `target`/checkpoints, as a run's would be. Weights keep their dtype. Raises CheckpointError
    for a model that we do not compute, for tensors that are missing, of another shape, or not accounted for.
    """
    model = from_huggingface(_read_json(source / CONFIG))
    tensors = _Tensors(source, model)
    held = [rule for rule in rules(model) if rule.held]
    pieces = [_piece(rule, tensors) for rule in held]
    tensors.refuse_others({name for rule in held for name in rule.huggingface})
    progress = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}
    metadata = {"config": _whole_config(model, tensors, target), "progress": progress}
    return save(target / "checkpoints", 0, pieces, metadata)


def _whole_config(model: ModelConfig, tensors: _Tensors, target: Path) -> dict[str, Any]:
    """A configuration that loads: the model's, and the least that the sections on training ask for."""
    dtype = tensors.get(rules(model)[0].huggingface[0]).dtype
    tree = {
        "description": f"imported from {tensors.folder.name}; only the model section says something",
        "model": model.model_dump(mode="json"),
        "train": {
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "steps": 1,
            "output_dir": str(target),
            "precision": {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32"),
        },
        "optimizer": {"lr": 1e-5, "schedule": "constant"},
    }
    return build_config(tree, str(tensors.folder / CONFIG)).model_dump(mode="json")


def _piece(rule: Rule, tensors: _Tensors) -> Piece:
    for name, shape in zip(rule.huggingface, rule.shapes(), strict=True):
        tensors.expect(name, shape)

    def load() -> torch.Tensor:
        return rule.from_huggingface(*(tensors.get(name) for name in rule.huggingface)).reshape(-1)

    numel = torch.Size(rule.shape).numel()
    data = Deferred(tensors.get(rule.huggingface[0]).dtype, (numel,), load)
    return Piece(rule.name, "weight", rule.shape, None, 0, 0, 0, data)


class _Tensors:
    """The tensors of a Hugging Face folder, mapped, by the names that the model with its head gives them."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.tied = folder, model.tie_embeddings
        self.where: dict[str, tuple[Any, str]] = {}
        for file in _weight_files(folder):
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                # GPT-2 on the Hub was saved from the model without its head.
                bare = name.startswith(("wte.", "wpe.", "h.", "ln_f."))
                self.where[f"transformer.{name}" if bare else name] = (opened, name)

    def get(self, name: str) -> torch.Tensor:
        opened, stored = self.where[name]
        tensor: torch.Tensor = opened.get_tensor(stored)
        return tensor

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.where:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing; is config.json that of the weights?"
            )
        if (found := tuple(self.get(name).shape)) != shape:
            raise CheckpointError(f"{self.folder}: tensor {name} is {found}, and config.json says {shape}")

    def refuse_others(self, known: set[str]) -> None:
        """Raise CheckpointError for tensors that would silently be left behind."""
        others = [name for name in self.where if name not in known and not name.endswith(_BUFFERS)]
        if self.tied:
            others = [name for name in others if name != "lm_head.weight"]  # a copy of the embedding
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            listed = ", ".join(others[:3]) + more
            raise CheckpointError(
                f"{self.folder}: no parameter of ours is {listed}; the model is not supported"
            )


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / SHARD_INDEX).is_file():
        for file in sorted(set(_read_json(folder / SHARD_INDEX)["weight_map"].values())):
            yield folder / file
    elif (folder / SINGLE).is_file():
        yield folder / SINGLE
    else:
        pickled = list(folder.glob("*.bin"))
        remedy = (
            "save it as safetensors: pickled .bin files are not read" if pickled else "is it a model folder?"
        )
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {SHARD_INDEX}; {remedy}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return content
