"""The normalization layer: LayerNorm or RMSNorm, by configuration."""

from typing import overload

from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.collectives import copy_to_tensor_region
from megatron_lite.parallel.layers import replicated


class Norm(nn.Module):
    """Normalizes the last dimension.

    Args:
        name: canonical prefix of the parameters.
        size: features normalized.
        sharded_input: each tensor rank sees other activations than its peers even without sequence parallelism
            (the per-head norms of queries and keys), so the weight's gradient is the sum over them.
    """

    def __init__(
        self, name: str, size: int, config: ModelConfig, runtime: Runtime, *, sharded_input: bool = False
    ) -> None:
        super().__init__()
        build = runtime.build
        self.mesh, self.ops, self.eps = build.mesh, runtime.ops, config.norm_epsilon
        self.rms, self.sharded_input = config.normalization == "RMSNorm", sharded_input
        self.weight = build.parameter(f"{name}.weight", (size,), fill=1.0)
        bias = config.add_bias_linear and not self.rms
        self.bias = build.parameter(f"{name}.bias", (size,)) if bias else None

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual, the norm of x + residual and that sum."""
        use = copy_to_tensor_region if self.sharded_input else replicated
        weight = use(self.weight, self.mesh)
        bias = None if self.bias is None else use(self.bias, self.mesh)
        if residual is None:
            if self.rms:
                return self.ops.rms_norm(x, weight, self.eps)
            return self.ops.layer_norm(x, weight, bias, self.eps)
        if self.rms:
            return self.ops.add_rms_norm(x, residual, weight, self.eps)
        return self.ops.add_layer_norm(x, residual, weight, bias, self.eps)
