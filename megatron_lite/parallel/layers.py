"""Linear layers and the embedding, sharded over the tensor-parallel ranks.

A column-parallel layer splits its output features and reads the full sequence; a row-parallel layer splits its
input features and returns to the layout between sublayers (Megatron-LM, arXiv:1909.08053 and 2205.05198).
At tensor-parallel size 1 all of them are the plain layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.parallel.collectives import (
    copy_to_tensor_region,
    enter_tensor_region,
    leave_tensor_region,
)
from megatron_lite.parallel.linear import column_parallel_linear
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import create_parameter


@dataclass(frozen=True)
class Build:
    """What every layer needs to make its parameters, and the blocks' linear layers for their products.

    Attributes:
        linear: `linear(x, weight, bias)`, of this rank's features.
    """

    mesh: Mesh
    seed: int
    dtype: torch.dtype
    device: torch.device
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dim: int | None = None,
        std: float | None = None,
        fill: float = 0.0,
    ) -> nn.Parameter:
        """`create_parameter` with this build's mesh, seed, dtype and device."""
        return create_parameter(
            name,
            shape,
            self.mesh,
            dim=dim,
            std=std,
            fill=fill,
            seed=self.seed,
            dtype=self.dtype,
            device=self.device,
        )


def replicated(parameter: Tensor, mesh: Mesh) -> Tensor:
    """A replicated parameter as used between sublayers.

    Under sequence parallelism each tensor rank uses it on its own part of the sequence, so its gradient is the sum
    over the ranks; otherwise every rank computes the same gradient already.
    """
    return copy_to_tensor_region(parameter, mesh) if mesh.sequence_parallel else parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features split over the tensor ranks.

    Args:
        name: canonical prefix of the parameters.
        in_features: size of x's last dimension.
        out_shape: shape of the output features: `(n,)`, or `(k, n)` for k projections computed by one GEMM, each
            sharded apart (gate and up of a gated MLP); then the output is [..., k * n / t].
        activation: `activation(y, bias)` is applied to y = x W^T, so that one kernel adds the bias, too.

    Shapes:
        x [b, s, in] (or [b, s/t, in] under sequence parallelism) -> [b, s, out/t].
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_shape: tuple[int, ...],
        build: Build,
        *,
        bias: bool,
        std: float,
        activation: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.mesh, self.linear, self.activation = build.mesh, build.linear, activation
        dim = len(out_shape) - 1
        self.weight = build.parameter(f"{name}.weight", (*out_shape, in_features), dim=dim, std=std)
        self.bias = build.parameter(f"{name}.bias", out_shape, dim=dim) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        weight = self.weight.flatten(0, -2)
        if self.activation is None:
            return self._product(x, weight, bias)
        return self.activation(self._product(x, weight, None), bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.linear is F.linear:
            return column_parallel_linear(x, weight, bias, self.mesh)
        return self.linear(enter_tensor_region(x, self.mesh), weight, bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features split over the tensor ranks; the bias is added once, after the sum.

    Shapes:
        x [b, s, in/t] -> [b, s, out] (or [b, s/t, out] under sequence parallelism).
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, build: Build, *, bias: bool, std: float
    ) -> None:
        super().__init__()
        self.mesh, self.linear = build.mesh, build.linear
        self.weight = build.parameter(f"{name}.weight", (out_features, in_features), dim=1, std=std)
        self.bias = build.parameter(f"{name}.bias", (out_features,)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh.tensor_size == 1:
            return self.linear(x, self.weight, self.bias)
        y = leave_tensor_region(self.linear(x, self.weight, None), self.mesh)
        return y if self.bias is None else y + replicated(self.bias, self.mesh)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary split over the tensor ranks.

    Each rank looks up the tokens of its own range and contributes zeros for the others; the sum is the embedding.

    Shapes:
        tokens [b, s] int64 -> [b, s, h] (or [b, s/t, h] under sequence parallelism).
    """

    def __init__(
        self, name: str, padded_vocab_size: int, hidden_size: int, build: Build, *, std: float
    ) -> None:
        super().__init__()
        self.mesh = build.mesh
        self.weight = build.parameter(f"{name}.weight", (padded_vocab_size, hidden_size), dim=0, std=std)
        self.start, self.stop = self.mesh.shard(padded_vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.tensor_size == 1:
            return F.embedding(tokens, self.weight)
        outside = (tokens < self.start) | (tokens >= self.stop)
        rows = F.embedding((tokens - self.start).masked_fill(outside, 0), self.weight)
        return leave_tensor_region(rows.masked_fill(outside.unsqueeze(-1), 0.0), self.mesh)


def vocab_parallel_logits(hidden: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
    """The output projection: [b, s, h] (or [b, s/t, h]) x [V/t, h] -> this rank's logits [b, s, V/t]."""
    return column_parallel_linear(hidden, weight, None, mesh)
