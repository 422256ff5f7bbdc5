"""Which Hugging Face tensors hold which of our parameters, and how they are laid out, both ways.

Ours keep queries, keys and values by group of heads (a group's query heads, its key head, its value head) in
one matrix, gate and up in another; `torch.nn.Linear` order, [out, in]. GPT-2 of Hugging Face has `Conv1D`,
[in, out], and all queries before all keys before all values. Rotary embeddings turn the two halves of a head
in both, so that no rows change places. Everything here moves elements, and none is changed: a round trip is
bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_lite.checkpoint.huggingface.config import family_of
from megatron_lite.config import ModelConfig

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """One of our parameters (global shape, vocabulary padded) and the Hugging Face tensors it is.

    `held` says whether our model has it: one that it lacks (a bias) is exported as zeros.
    """

    name: str
    shape: tuple[int, ...]
    huggingface: tuple[str, ...]
    to_huggingface: Callable[[torch.Tensor], Tensors]
    from_huggingface: Callable[..., torch.Tensor]
    held: bool = True

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the Hugging Face tensors."""
        return [tuple(tensor.shape) for tensor in self.to_huggingface(torch.empty(self.shape, device="meta"))]


def rules(model: ModelConfig) -> list[Rule]:
    """The whole model, in order. Raises CheckpointError where no Hugging Face family computes it."""
    return _gpt2(model) if family_of(model) == "gpt2" else _llama(model)


def _same(name: str, shape: tuple[int, ...], huggingface: str, held: bool = True) -> Rule:
    return Rule(name, shape, (huggingface,), lambda x: (x,), lambda x: x, held)


def _transposed(name: str, shape: tuple[int, int], huggingface: str) -> Rule:
    return Rule(name, shape, (huggingface,), lambda x: (x.T,), lambda x: x.T)


def _norm(name: str, size: int, huggingface: str, bias: bool) -> list[Rule]:
    """A LayerNorm, which in Hugging Face's models always has a bias."""
    return [
        _same(f"{name}.weight", (size,), f"{huggingface}.weight"),
        _same(f"{name}.bias", (size,), f"{huggingface}.bias", bias),
    ]


def _vocabulary(model: ModelConfig, name: str, huggingface: str) -> Rule:
    """Rows beyond the vocabulary are padding: left out there, zeros here."""
    rows, padded = model.vocab_size, model.padded_vocab_size

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_zeros(padded - x.shape[0], x.shape[1])])

    return Rule(name, (padded, model.hidden_size), (huggingface,), lambda x: (x[:rows],), pad)


def _head(model: ModelConfig) -> list[Rule]:
    return [] if model.tie_embeddings else [_vocabulary(model, "head.weight", "lm_head.weight")]


def _swap(x: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Rows laid out as [outer, inner, …] laid out as [inner, outer, …]."""
    return x.reshape(outer, inner, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _gpt2(model: ModelConfig) -> list[Rule]:
    hidden, ffn, heads, bias = (
        model.hidden_size,
        model.ffn_size,
        model.num_attention_heads,
        model.add_bias_linear,
    )
    found = [
        _vocabulary(model, "embed.weight", "transformer.wte.weight"),
        _same("position.weight", (model.max_positions, hidden), "transformer.wpe.weight"),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        qkv, proj = f"{ours}.attention.linear_qkv", f"{ours}.attention.linear_proj"
        fc1, fc2 = f"{ours}.mlp.linear_fc1", f"{ours}.mlp.linear_fc2"
        found += [
            *_norm(f"{ours}.input_layernorm", hidden, f"{theirs}.ln_1", bias),
            Rule(
                f"{qkv}.weight",
                (3 * hidden, hidden),
                (f"{theirs}.attn.c_attn.weight",),
                lambda x: (_swap(x, heads, 3).T,),
                lambda x: _swap(x.T, 3, heads),
            ),
            Rule(
                f"{qkv}.bias",
                (3 * hidden,),
                (f"{theirs}.attn.c_attn.bias",),
                lambda x: (_swap(x, heads, 3),),
                lambda x: _swap(x, 3, heads),
                model.qkv_bias,
            ),
            _transposed(f"{proj}.weight", (hidden, hidden), f"{theirs}.attn.c_proj.weight"),
            _same(f"{proj}.bias", (hidden,), f"{theirs}.attn.c_proj.bias", bias),
            *_norm(f"{ours}.pre_mlp_layernorm", hidden, f"{theirs}.ln_2", bias),
            _transposed(f"{fc1}.weight", (ffn, hidden), f"{theirs}.mlp.c_fc.weight"),
            _same(f"{fc1}.bias", (ffn,), f"{theirs}.mlp.c_fc.bias", bias),
            _transposed(f"{fc2}.weight", (hidden, ffn), f"{theirs}.mlp.c_proj.weight"),
            _same(f"{fc2}.bias", (hidden,), f"{theirs}.mlp.c_proj.bias", bias),
        ]
    return found + _norm("norm", hidden, "transformer.ln_f", bias) + _head(model)


def _llama(model: ModelConfig) -> list[Rule]:
    hidden = model.hidden_size
    found = [_vocabulary(model, "embed.weight", "model.embed_tokens.weight")]
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found += [
            _same(f"{ours}.input_layernorm.weight", (hidden,), f"{theirs}.input_layernorm.weight"),
            *_llama_attention(model, f"{ours}.attention", f"{theirs}.self_attn"),
            _same(f"{ours}.pre_mlp_layernorm.weight", (hidden,), f"{theirs}.post_attention_layernorm.weight"),
            *_llama_mlp(model, f"{ours}.mlp", f"{theirs}.mlp"),
        ]
    return [*found, _same("norm.weight", (hidden,), "model.norm.weight"), *_head(model)]


def _llama_attention(model: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    hidden, groups, width = model.hidden_size, model.query_groups, model.head_dim
    heads = model.num_attention_heads // groups  # query heads of a group

    def split(x: torch.Tensor) -> Tensors:
        x = x.view(groups, heads + 2, width, *x.shape[1:])
        return tuple(part.flatten(0, 2) for part in x.split((heads, 1, 1), dim=1))

    def join(*parts: torch.Tensor) -> torch.Tensor:
        grouped = [part.reshape(groups, -1, width, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)

    rows = groups * (heads + 2) * width
    found = [
        Rule(f"{ours}.linear_qkv.weight", (rows, hidden), _each(theirs, "qkv", "weight"), split, join),
        _same(
            f"{ours}.linear_proj.weight",
            (hidden, model.num_attention_heads * width),
            f"{theirs}.o_proj.weight",
        ),
    ]
    if model.qkv_bias or model.add_bias_linear:
        names = _each(theirs, "qkv", "bias")
        found.append(Rule(f"{ours}.linear_qkv.bias", (rows,), names, split, join, model.qkv_bias))
    if model.add_bias_linear:
        found.append(_same(f"{ours}.linear_proj.bias", (hidden,), f"{theirs}.o_proj.bias"))
    if model.qk_layernorm:
        found.append(_same(f"{ours}.q_layernorm.weight", (width,), f"{theirs}.q_norm.weight"))
        found.append(_same(f"{ours}.k_layernorm.weight", (width,), f"{theirs}.k_norm.weight"))
    return found


def _llama_mlp(model: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    hidden, ffn = model.hidden_size, model.ffn_size

    def split(x: torch.Tensor) -> Tensors:
        return x[0], x[1]

    def join(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.stack((gate, up))

    found = []
    for kind, inner in (("weight", (hidden,)), ("bias", ()))[: 2 if model.add_bias_linear else 1]:
        names = _each(theirs, ("gate", "up"), kind)
        found.append(Rule(f"{ours}.linear_fc1.{kind}", (2, ffn, *inner), names, split, join))
        shape = (hidden, ffn) if kind == "weight" else (hidden,)
        found.append(_same(f"{ours}.linear_fc2.{kind}", shape, f"{theirs}.down_proj.{kind}"))
    return found


def _each(prefix: str, projections: Iterable[str], kind: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{projection}_proj.{kind}" for projection in projections)
