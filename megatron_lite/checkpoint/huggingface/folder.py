"""The weights of a Hugging Face folder: which files they are in, and what refuses them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.weights import Rule
from megatron_lite.config import ModelConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
UNFINISHED = "unfinished_export.json"  # there while an export gives its weights their own names
# Buffers that old releases of transformers saved beside the weights: made anew from the configuration.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Folder:
    """The tensors of a Hugging Face folder, mapped, by the names that the model with its head gives them.

    Raises CheckpointError for weights in another form than safetensors, and for a shard that is not there.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.path, self.tied = path, model.tie_embeddings
        self._where: dict[str, tuple[Any, str]] = {}
        self._wider: dict[
            str, torch.dtype
        ] = {}  # of tensors that are one parameter of ours, where theirs differ
        for file in weight_files(path):
            opened = open_weights(file)
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                # GPT-2 on the Hub was saved from the model without its head.
                bare = name.startswith(("wte.", "wpe.", "h.", "ln_f."))
                self._where[f"transformer.{name}" if bare else name] = (opened, name)
        if model.num_layers > len(self._where):  # before a list is made of what they should hold
            fault = f"config.json says {model.num_layers} layers, and there are {len(self._where)} tensors"
            raise CheckpointError(f"{path}: {fault}; is config.json that of the weights?")

    def get(self, name: str) -> torch.Tensor:
        """A tensor, mapped. Raises CheckpointError where there is none of that name."""
        if name not in self._where:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing; is config.json that of the weights?"
            )
        opened, stored = self._where[name]
        tensor: torch.Tensor = opened.get_tensor(stored)
        return tensor.to(self._wider.get(name, tensor.dtype))

    def parameter(self, rule: Rule) -> torch.Tensor:
        """One of our parameters, put together."""
        return rule.from_huggingface(*(self.get(name) for name in rule.huggingface))

    def check(self, rules: Iterable[Rule]) -> None:
        """Raise CheckpointError unless the tensors of `rules` are there, of the right shape, and no others are.

        Others would silently be left behind.
        """
        known = set()
        for rule in rules:
            dtypes = set()
            for name, shape in zip(rule.huggingface, rule.shapes(), strict=True):
                tensor = self.get(name)
                if tensor.dtype not in _DTYPES:
                    fault = f"tensor {name} is {tensor.dtype}: quantized weights are not read"
                    raise CheckpointError(f"{self.path}: {fault}")
                if (found := tuple(tensor.shape)) != shape:
                    raise CheckpointError(
                        f"{self.path}: tensor {name} is {found}, and config.json says {shape}"
                    )
                known.add(name)
                dtypes.add(tensor.dtype)
            if len(dtypes) > 1:
                self._wider |= dict.fromkeys(rule.huggingface, reduce(torch.promote_types, dtypes))
        others = [name for name in self._where if name not in known and not name.endswith(_BUFFERS)]
        if self.tied:
            others = [name for name in others if name != "lm_head.weight"]  # a copy of the embedding
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            listed = ", ".join(others[:3]) + more
            raise CheckpointError(
                f"{self.path}: no parameter of ours is {listed}; the model is not supported"
            )


def open_weights(file: Path) -> Any:
    """A safetensors file, mapped. Raises CheckpointError where it cannot be read."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises CheckpointError where it holds none, or names some elsewhere."""
    if (folder / SHARD_INDEX).is_file():
        index = folder / SHARD_INDEX
        named = read_json(index).get("weight_map")
        files = list(named.values()) if isinstance(named, dict) else []
        if not files or not all(isinstance(file, str) for file in files):
            raise CheckpointError(
                f"{index}: weight_map does not say which file holds which tensor; download it again"
            )
        for file in files:
            if file in ("", "..") or Path(file).name != file:
                raise CheckpointError(f'{index} names "{file}", which is not in its folder')
        return [folder / file for file in sorted(set(files))]
    if not (folder / SINGLE).is_file():
        remedy = "is it a model folder?"
        if (folder / UNFINISHED).is_file():
            remedy = "an export into it was cut short; export again"
        elif list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
            remedy = "save it as safetensors: pickled .bin files are not read"
        elif others := sorted(path.name for path in folder.glob("*.safetensors")):
            remedy = f"{others[0]} is another layout; take the folder in transformers' own"
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {SHARD_INDEX}; {remedy}")
    return [folder / SINGLE]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
