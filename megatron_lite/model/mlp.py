"""The feed-forward half of a block, plain (GELU) or gated (SwiGLU)."""

import math

from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """Two linear layers with an activation between them; the inner features are split over the tensor ranks.

    Gate and up of a gated layer are one parameter of shape [2, ffn, h] split along ffn, so that one GEMM computes
    both and every rank holds matching halves.
    """

    def __init__(self, name: str, config: ModelConfig, runtime: Runtime) -> None:
        super().__init__()
        build, ffn, std, bias = runtime.build, config.ffn_size, config.init_method_std, config.add_bias_linear
        out_shape = (2, ffn) if config.activation == "swiglu" else (ffn,)
        self.linear_fc1 = ColumnParallelLinear(
            f"{name}.linear_fc1",
            config.hidden_size,
            out_shape,
            build,
            bias=bias,
            std=std,
            activation=getattr(runtime.ops, config.activation),
        )
        self.linear_fc2 = RowParallelLinear(
            f"{name}.linear_fc2",
            ffn,
            config.hidden_size,
            build,
            bias=bias,
            std=std / math.sqrt(2 * config.num_layers),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.linear_fc1(x))
