"""Causal self-attention with grouped queries; heads are split over the tensor ranks."""

import math

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.config import ModelConfig
from megatron_lite.model.norm import Norm
from megatron_lite.model.rotary import Rotary
from megatron_lite.model.runtime import Context, Runtime
from megatron_lite.ops import ProbabilityDropout
from megatron_lite.ops.qkv import split_qkv
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.parallel.random import place_seed


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    The query/key/value projection is laid out by key/value group: for each group its query heads, its key head,
    its value head. So a slice of its rows is a whole number of groups, on any layout.

    Shapes:
        x [b, s, h] (or [b, s/t, h] under sequence parallelism) -> the same.
    """

    def __init__(
        self, name: str, layer: int, config: ModelConfig, runtime: Runtime, rotary: Rotary | None
    ) -> None:
        super().__init__()
        build, mesh = runtime.build, runtime.mesh
        self.name, self.layer, self.rotary = name, layer, rotary
        self.mesh, self.ops, self.dropout = mesh, runtime.ops, config.attention_dropout
        self.selective = runtime.recompute == "selective"
        self.head_dim = config.head_dim
        self.groups = config.query_groups // mesh.tensor_size  # held by this rank
        self.heads_per_group = config.num_attention_heads // config.query_groups
        rows = config.query_groups * (self.heads_per_group + 2) * self.head_dim
        width = config.num_attention_heads * self.head_dim
        std = config.init_method_std
        self.linear_qkv = ColumnParallelLinear(
            f"{name}.linear_qkv", config.hidden_size, (rows,), build, bias=config.qkv_bias, std=std
        )
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = Norm(f"{name}.q_layernorm", self.head_dim, config, runtime, sharded_input=True)
            self.k_layernorm = Norm(f"{name}.k_layernorm", self.head_dim, config, runtime, sharded_input=True)
        self.linear_proj = RowParallelLinear(
            f"{name}.linear_proj",
            width,
            config.hidden_size,
            build,
            bias=config.add_bias_linear,
            std=std / math.sqrt(2 * config.num_layers),  # GPT-2: residual branches start small
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self._project(x)
        if self.rotary is not None:
            q, k = self._rotate(q, k, context)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        if self.selective and self.training:
            out = checkpoint(self._attend, q, k, v, context, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._attend(q, k, v, context)
        return self.linear_proj(out.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, heads, s, d], keys and values [b, groups, s, d] of this rank."""
        q, k, v = split_qkv(self.linear_qkv(x), self.groups, self.heads_per_group, self.head_dim)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        return q, k, v

    def _rotate(self, q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        limit = q.size(2) if context.cache is None else context.cache.capacity
        cos, sin = self.rotary(context.positions, limit, q.device)
        return self.ops.rotary(q, k, cos, sin)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        dropout = None
        if self.dropout > 0 and self.training:
            seed = place_seed(context.dropout_seed, f"{self.name}.probabilities")
            heads = q.size(1)
            dropout = ProbabilityDropout(
                self.dropout, seed, self.mesh.tensor_rank * heads, self.mesh.tensor_size * heads
            )
        return self.ops.attention(q, k, v, documents=context.documents, dropout=dropout)
