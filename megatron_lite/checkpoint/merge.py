"""The weights of a checkpoint as plain safetensors, for readers that know nothing of us."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import Deferred, write_atomically, write_safetensors
from megatron_lite.checkpoint.reader import Reader

SINGLE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
MODEL = "model_config.json"


def merge(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, file_bytes: int = 5_000_000_000
) -> list[str]:
    """Write the weights of the step folder `source` under their canonical names; the names of the files.

    One file, or, where that would have more than `file_bytes` bytes, several and an index as on the Hugging Face
    Hub. model_config.json says how the model is made. The vocabulary keeps its padding. One parameter is in memory
    at a time.

    Raises:
        CheckpointError: `target` holds weights already.
    """
    if list(target.glob("*.safetensors")):
        raise CheckpointError(f"{target} holds safetensors files already; give an empty folder")
    with Reader(source) as reader:
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: _deferred(reader, name, dtype or reader.dtype(name)) for name in reader.names()}
        files = _write(target, tensors, file_bytes, {"format": "pt", "step": str(reader.step)})
        model = reader.metadata.get("config", {}).get("model")
    if model is not None:
        write_atomically(target / MODEL, (json.dumps(model, indent=2) + "\n").encode())
    return files


def _deferred(reader: Reader, name: str, dtype: torch.dtype) -> Deferred:
    def load() -> torch.Tensor:
        found = reader.read(name)
        reader.close()  # pages of mapped files count as this process's memory until they are unmapped
        return found.to(dtype)

    return Deferred(dtype, reader.shape(name), load)


def _write(
    target: Path, tensors: dict[str, Deferred], file_bytes: int, metadata: dict[str, str]
) -> list[str]:
    files: list[dict[str, Deferred]] = [{}]
    sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if files[-1] and sum(sizes[held] for held in files[-1]) + sizes[name] > file_bytes:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        write_safetensors(target / SINGLE, files[0], metadata)
        return [SINGLE]
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, held in zip(names, files, strict=True):
        write_safetensors(target / file, held, metadata)
    weight_map = {name: file for file, held in zip(names, files, strict=True) for name in held}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_atomically(target / SHARD_INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return names
