"""The GPT model, once: a list of named layers, from which the plain module and the pipeline are both made."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.model.block import Block
from megatron_lite.model.norm import Norm
from megatron_lite.model.rotary import Rotary
from megatron_lite.model.runtime import Context, Runtime
from megatron_lite.parallel.layers import VocabParallelEmbedding, replicated, vocab_parallel_logits
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.parallel.random import dropout, place_seed
from megatron_lite.parallel.stages import Layer


class Embedding(VocabParallelEmbedding):
    """Token embedding as a layer of the list: ignores the context."""

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(tokens)


class Position(nn.Module):
    """Entry to the residual stream: learned positions (where configured) and dropout.

    Shapes:
        hidden [b, s, h] (or [b, s/t, h] under sequence parallelism) -> the same.
    """

    def __init__(self, name: str, config: ModelConfig, runtime: Runtime) -> None:
        super().__init__()
        self.name, self.mesh, self.ops = name, runtime.mesh, runtime.ops
        self.dropout = config.hidden_dropout
        self.weight = None
        if config.position_embedding == "learned_absolute":
            self.weight = runtime.build.parameter(
                f"{name}.weight", (config.max_positions, config.hidden_size), std=config.init_method_std
            )

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        if self.weight is not None:
            hidden = hidden + self._rows(replicated(self.weight, self.mesh), hidden.size(1), context)
        if self.dropout > 0 and self.training:
            seed = place_seed(context.dropout_seed, self.name)
            sharded = self.mesh.sequence_parallel
            hidden = dropout(hidden, self.dropout, seed, self.mesh, self.ops, sharded=sharded)
        return hidden

    def _rows(self, weight: Tensor, length: int, context: Context) -> Tensor:
        """The embeddings of this rank's positions, `length` of them."""
        start = self.mesh.tensor_rank * length if self.mesh.sequence_parallel else 0
        if context.positions is None:
            return weight[start : start + length]
        return F.embedding(context.positions[:, start : start + length], weight)


class FinalNorm(Norm):
    """The last norm as a layer of the list: ignores the context."""

    def forward(self, hidden: Tensor, context: Context | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(hidden)


class Head(nn.Module):
    """Output projection to this tensor rank's part of the vocabulary: [b, s, h] -> logits [b, s, V/t]."""

    def __init__(
        self, name: str, config: ModelConfig, runtime: Runtime, weight: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.mesh = runtime.mesh
        if weight is None:
            shape = (config.padded_vocab_size, config.hidden_size)
            weight = runtime.build.parameter(f"{name}.weight", shape, dim=0, std=config.init_method_std)
        self.weight = weight

    def forward(self, hidden: Tensor, context: Context | None = None) -> Tensor:
        return vocab_parallel_logits(hidden, self.weight, self.mesh)


def gpt_layers(config: ModelConfig, runtime: Runtime) -> list[Layer]:
    """The whole model in order: embed, position, blocks.0 ..., norm, head.

    The runtime's ops decide the kernels, its mesh the sharding; nothing here knows of pipeline stages.
    """
    c, hidden = config, config.hidden_size
    rotary = Rotary(c) if c.position_embedding == "rope" else None
    gated = 2 if c.activation == "swiglu" else 1
    width = c.num_attention_heads * c.head_dim
    qkv = (c.num_attention_heads + 2 * c.query_groups) * c.head_dim
    # Causal attention multiplies queries by keys and probabilities by values over half the sequence on average.
    block_cost = hidden * (qkv + width + (gated + 1) * c.ffn_size) + width * c.seq_length

    def block(layer: int) -> Layer:
        name = f"blocks.{layer}"
        return Layer(name, lambda _: Block(name, layer, c, runtime, rotary), block_cost, repeated=True)

    def embedding(_: nn.Parameter | None) -> nn.Module:
        return Embedding("embed", c.padded_vocab_size, hidden, runtime.build, std=c.init_method_std)

    return [
        Layer("embed", embedding),
        Layer("position", lambda _: Position("position", c, runtime)),
        *(block(layer) for layer in range(c.num_layers)),
        Layer("norm", lambda _: FinalNorm("norm", hidden, c, runtime)),
        Layer(
            "head",
            lambda weight: Head("head", c, runtime, weight),
            hidden * c.padded_vocab_size,
            tied_to="embed" if c.tie_embeddings else None,
        ),
    ]


class GPT(nn.Module):
    """All layers in one module, for training without a pipeline, evaluation, generation and conversion.

    Parameter names are the canonical ones (`blocks.0.attention.linear_qkv.weight`).
    """

    embed: nn.Module
    position: nn.Module
    norm: nn.Module
    head: nn.Module

    def __init__(self, config: ModelConfig, runtime: Runtime) -> None:
        super().__init__()
        self.config, self.runtime = config, runtime
        self.blocks = nn.ModuleList()
        for layer in gpt_layers(config, runtime):
            tied = getattr(self, layer.tied_to).weight if layer.tied_to else None
            if layer.repeated:
                self.blocks.append(layer.build(tied))
            else:
                self.add_module(layer.name, layer.build(tied))

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """Tokens [b, s] -> this tensor rank's logits [b, s, V/t].

        Raises:
            ValueError: more tokens than there are learned positions.
        """
        limit = self.config.max_positions
        if self.config.position_embedding == "learned_absolute" and tokens.size(1) > limit:
            raise ValueError(f"{tokens.size(1)} tokens, but the model has {limit} learned positions")
        context = self.runtime.context() if context is None else context
        hidden = self.embed(tokens, context)
        hidden = self.position(hidden, context)
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.head(self.norm(hidden, context), context)

    @torch.no_grad()
    def load_weights(self, get: Callable[[str, int | None, int, int], Tensor]) -> None:
        """Fills every parameter from `get(name, dim, start, stop)`, which returns this rank's slice."""
        for parameter in self.parameters():
            spec = spec_of(parameter)
            parameter.copy_(get(spec.name, spec.dim, spec.start, spec.stop))
