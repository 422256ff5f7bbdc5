"""The weights of a checkpoint as plain safetensors, for readers that know nothing of us."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_lite.checkpoint.files import Deferred
from megatron_lite.checkpoint.huggingface.exporting import check_free, rounded, write_weights
from megatron_lite.checkpoint.reader import Reader

MODEL = "model_config.json"


def merge(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, file_bytes: int = 5_000_000_000
) -> list[str]:
    """Write the weights of the step folder `source` under their canonical names; the names of the files.

    One file, or, where that would have more than `file_bytes` bytes, several and an index as on the Hugging Face
    Hub. model_config.json says how the model is made. The vocabulary keeps its padding. One parameter is in memory
    at a time.

    Raises:
        CheckpointError: `target` holds weights already, or a weight is too large for `dtype`.
    """
    check_free(target)
    with Reader(source) as reader:
        tensors = {name: _deferred(reader, name, dtype or reader.dtype(name)) for name in reader.names()}
        model = reader.metadata.get("config", {}).get("model")
        return write_weights(target, tensors, file_bytes, {} if model is None else {MODEL: model})


def _deferred(reader: Reader, name: str, dtype: torch.dtype) -> Deferred:
    def load() -> torch.Tensor:
        found = reader.read(name)
        reader.close()  # pages of mapped files count as this process's memory until they are unmapped
        return rounded(found, dtype, name)

    return Deferred(dtype, reader.shape(name), load)
