"""Megatron's names of parameters, old and new, in ours.

Megatron-core lays queries, keys and values out as we do (a group's query heads, its key head, its value head), puts
gate before up, and so does Megatron-DeepSpeed: where the names agree, so do the elements in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_lite.checkpoint.errors import CheckpointError

_CORE_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "attention.linear_qkv",
    "self_attention.linear_proj": "attention.linear_proj",
    "self_attention.q_layernorm": "attention.q_layernorm",
    "self_attention.k_layernorm": "attention.k_layernorm",
    "pre_mlp_layernorm": "pre_mlp_layernorm",
    "mlp.linear_fc1": "mlp.linear_fc1",
    "mlp.linear_fc2": "mlp.linear_fc2",
}
# Transformer Engine has each norm inside the linear layer behind it, and checkpoints are written as if all had.
_CORE_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_OLD_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": "attention.linear_qkv",
    "self_attention.dense": "attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_TOP = {
    "embedding.word_embeddings.weight": "embed.weight",
    "embedding.position_embeddings.weight": "position.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "decoder.final_layernorm.bias": "norm.bias",
    "encoder.final_layernorm.weight": "norm.weight",
    "encoder.final_layernorm.bias": "norm.bias",
    "output_layer.weight": "head.weight",
    # DeepSpeed's pipeline module, tied.
    "tied_modules.embed.word_embeddings.weight": "embed.weight",
    "tied_modules.embed.position_embeddings.weight": "position.weight",
}
_PREFIX = re.compile(r"^(module\.|model\.|language_model\.)+")
_LAYER = re.compile(r"(?:decoder|encoder|transformer)\.layers\.(\d+)\.(.+)")
_NUMBERED = re.compile(r"(\d+)\.(.+)")


def ours(names: Iterable[str]) -> dict[str, str]:
    """Our name -> the name in the checkpoint, for every parameter of a GPT of Megatron-LM or Megatron-DeepSpeed.

    Raises:
        CheckpointError: some are of no GPT that we compute; the message lists them.
    """
    found: dict[str, str] = {}
    unknown = []
    names = sorted(names)
    first = _first_block(names)
    for name in names:
        known = _translate(_PREFIX.sub("", name), first)
        if known is None:
            unknown.append(name)
        elif known in found:
            raise CheckpointError(
                f"{found[known]} and {name} are both {known}; the checkpoint holds two models"
            )
        else:
            found[known] = name
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise CheckpointError(
            f"no parameter of ours is {', '.join(unknown[:4])}{more}; only dense GPT models of Megatron-LM and "
            "Megatron-DeepSpeed are read"
        )
    return found


def _first_block(names: list[str]) -> int | None:
    """The number of the first transformer block in a pipeline module's list of layers; None where there is no list."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    blocks = {int(match[1]) for match in matches if match and match[2].startswith("self_attention.")}
    return min(blocks, default=None)


def _translate(name: str, first: int | None) -> str | None:
    if name in _TOP:
        return _TOP[name]
    if match := _LAYER.fullmatch(name):
        return _block(int(match[1]), match[2])
    if first is None or not (match := _NUMBERED.fullmatch(name)):
        return None
    number, rest = int(match[1]), match[2]
    if rest in ("weight", "bias"):
        return f"norm.{rest}"
    if rest == "lm_head.weight":
        return "head.weight"
    if number < first:
        return _TOP.get(f"embedding.{rest}")
    return _block(number - first, rest)


def _block(layer: int, rest: str) -> str | None:
    for theirs, mine in _CORE_NORMS.items():
        if rest.startswith(theirs):
            return f"blocks.{layer}.{mine}{rest.removeprefix(theirs)}"
    module, _, kind = rest.rpartition(".")
    name = _CORE_LAYER.get(module) or _OLD_LAYER.get(module)
    return f"blocks.{layer}.{name}.{kind}" if name and kind in ("weight", "bias") else None
