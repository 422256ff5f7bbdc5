"""From a checkpoint to a Hugging Face folder, one parameter in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import (
    Deferred,
    fsync_directory,
    write_atomically,
    write_json,
    write_safetensors,
)
from megatron_lite.checkpoint.huggingface.config import to_huggingface
from megatron_lite.checkpoint.huggingface.folder import (
    CONFIG,
    GENERATION_CONFIG,
    SHARD_INDEX,
    SINGLE,
    UNFINISHED,
    read_json,
)
from megatron_lite.checkpoint.huggingface.tokenizer import export_tokenizer
from megatron_lite.checkpoint.huggingface.weights import Rule, rules
from megatron_lite.checkpoint.reader import Reader
from megatron_lite.checkpoint.store import check_room
from megatron_lite.config import ModelConfig

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `tokenizer` says in words which files, or why none."""

    model: ModelConfig
    config: dict[str, Any]
    files: list[str]
    tokenizer: str


def model_config(reader: Reader) -> ModelConfig:
    """The model section that a checkpoint was saved with."""
    try:
        section = reader.metadata["config"]["model"]
    except KeyError:
        raise CheckpointError(
            f"{reader.path}: its metadata holds no config.model, so it cannot be converted"
        ) from None
    return ModelConfig.model_validate_json(json.dumps(section))


def export_huggingface(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    family: str | None = None,
    tokenizer: str | None = None,
) -> Exported:
    """Write the weights of the step folder `source` as a Hugging Face folder, with configuration and tokenizer.

    dtype: that weights are rounded to; None: as they are stored
    shard_bytes: of weights in one file, 5 GB as on the Hub; a tensor is never divided
    family: see `to_huggingface`; None: the one the model was imported as, or that computes it
    tokenizer: its specification; None: the checkpoint's own, where its files can be read

    Raises CheckpointError where no Hugging Face family computes the model, where `target` holds weights already,
    where the checkpoint is damaged, or where a weight is too large for fp16.
    """
    with Reader(source) as reader:
        model = model_config(reader)
        check_free(target)
        imported = reader.metadata.get("huggingface") or {}
        stored = dtype or reader.dtype("embed.weight")
        ids = {key: value for key, value in imported.get("config", {}).items() if key.endswith("_token_id")}
        if family is None and imported.get("config", {}).get("model_type") == "mistral":
            family = "mistral"
        config = to_huggingface(model, str(stored).removeprefix("torch."), family=family, token_ids=ids)
        tensors = _tensors(reader, model, dtype)
        written = export_tokenizer(reader, tokenizer, target, model)
        config |= {key: value for key, value in written.ids.items() if config.get(key) is None}
        generation = imported.get("generation_config")
        if generation is None:
            tokens = ("bos_token_id", "eos_token_id")
            generation = {key: config[key] for key in tokens if config[key] is not None}
        described = {GENERATION_CONFIG: generation, CONFIG: config}
        files = write_weights(target, tensors, shard_bytes, described, written.files)
    return Exported(model, config, files, written.note)


def _tensors(reader: Reader, model: ModelConfig, dtype: torch.dtype | None) -> dict[str, Deferred]:
    """Every tensor of the export in order, those of one parameter side by side."""
    held: dict[str, tuple[torch.Tensor, ...]] = {}

    def parts(rule: Rule) -> tuple[torch.Tensor, ...]:
        """A parameter in pieces; kept until the next one's turn, so that each is read once."""
        if rule.name not in held:
            held.clear()
            held[rule.name] = rule.to_huggingface(rounded(reader.read(rule.name), dtype, rule.name))
        return held[rule.name]

    def loader(rule: Rule, part: int) -> Callable[[], torch.Tensor]:
        return lambda: parts(rule)[part]

    found = {}
    for rule in rules(model):
        if rule.held and reader.shape(rule.name) != rule.shape:
            shape = reader.shape(rule.name)
            raise CheckpointError(
                f"{reader.path}: {rule.name} is {shape}, its config.model says {rule.shape}"
            )
        kind = dtype or reader.dtype(rule.name if rule.held else "embed.weight")
        for part, (name, shape) in enumerate(zip(rule.huggingface, rule.shapes(), strict=True)):
            zeros = lambda shape=shape, kind=kind: torch.zeros(shape, dtype=kind)  # noqa: E731
            found[name] = Deferred(kind, shape, loader(rule, part) if rule.held else zeros)
    return found


def rounded(weight: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """`weight` in `dtype`, to the nearest. Raises CheckpointError where it is finite there, and not here."""
    if dtype is None or weight.dtype == dtype:
        return weight
    narrow = weight.to(dtype)
    if bool((narrow.isinf() & weight.isfinite()).any()):
        largest = float(weight.abs().max())
        fault = f"{name} holds {largest:.3g}, more than {dtype} can"
        raise CheckpointError(f"{fault}; export it as bf16 or fp32")
    return narrow


def check_free(target: Path) -> None:
    """Raise CheckpointError where `target` holds weights, unless an export that was cut short left them.

    And where it is a run's output directory, whose own config.json would be replaced.
    """
    if (target / "checkpoints").is_dir():
        raise CheckpointError(f"{target} holds checkpoints already; give another folder")
    left = _left_behind(target)
    if any(file not in left for file in target.glob("*.safetensors")):
        raise CheckpointError(f"{target} holds safetensors files already; give an empty folder")


def write_weights(
    target: Path,
    tensors: dict[str, Deferred],
    shard_bytes: int,
    described: dict[str, Any],
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> list[str]:
    """Write the shards, their index where they are several, and `described`, JSON by file name; the shards' names.

    others: files that belong to the model and say nothing of it, by name

    Whatever kills it: no weights lie under their own names before all of them are on the disk, `others` and the index
    come after them, and the last of `described`, without which readers know no model, at the very end. The next export
    into the folder clears away what is left. Where a tensor cannot be made, or the disk is full, nothing is left.
    """
    shards, total = _divided(tensors, shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    temporary = [target / f"{file}.tmp" for file in files]
    target.mkdir(parents=True, exist_ok=True)
    _remove(target.glob("model*.safetensors*.tmp"))  # of a run that was killed
    check_room(target, total)
    try:
        for path, shard in zip(temporary, shards, strict=True):
            write_safetensors(path, shard, {"format": "pt"})
        left = _left_behind(target)
        write_json(target / UNFINISHED, {"weights": sorted({*files, *(file.name for file in left)})})
    except BaseException:
        _remove(temporary)
        raise
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        described = {SHARD_INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}} | described
    # Another model's description, as a folder with its tokenizer has one, would make a model of the first shard.
    _remove([*(target / name for name in described), target / SHARD_INDEX, *left])
    fsync_directory(target)
    for path in temporary:
        os.replace(path, path.with_suffix(""))
    fsync_directory(target)
    for name, data in others.items():
        write_atomically(target / name, data)
    for name, content in described.items():
        write_json(target / name, content)
    _remove([target / UNFINISHED])
    return files


def _divided(tensors: dict[str, Deferred], shard_bytes: int) -> tuple[list[dict[str, Deferred]], int]:
    """The tensors of each shard, and the bytes of all."""
    shards: list[dict[str, Deferred]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + size, total + size
    return shards, total


def _left_behind(target: Path) -> list[Path]:
    """Weights under their own names that an export was killed with, before the last of their description."""
    if not (target / UNFINISHED).is_file():
        return []
    names = read_json(target / UNFINISHED).get("weights", [])
    return [file for file in target.glob("*.safetensors") if file.name in names]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
