"""The normalization layer: LayerNorm or RMSNorm, by configuration."""

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

    def forward(self, x: Tensor) -> Tensor:
        use = copy_to_tensor_region if self.sharded_input else replicated
        weight = use(self.weight, self.mesh)
        if self.rms:
            return self.ops.rms_norm(x, weight, self.eps)
        bias = None if self.bias is None else use(self.bias, self.mesh)
        return self.ops.layer_norm(x, weight, bias, self.eps)
