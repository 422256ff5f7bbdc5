"""One transformer block: attention and feed-forward, each behind a norm and added to the residual stream."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.config import ModelConfig
from megatron_lite.model.attention import Attention
from megatron_lite.model.mlp import MLP
from megatron_lite.model.norm import Norm
from megatron_lite.model.rotary import Rotary
from megatron_lite.model.runtime import Context, Runtime
from megatron_lite.parallel.random import dropout, place_seed


class Block(nn.Module):
    """A pre-norm transformer block.

    Shapes:
        hidden [b, s, h] (or [b, s/t, h] under sequence parallelism) -> the same.
    """

    def __init__(
        self, name: str, layer: int, config: ModelConfig, runtime: Runtime, rotary: Rotary | None
    ) -> None:
        super().__init__()
        self.name, self.mesh, self.ops = name, runtime.mesh, runtime.ops
        self.dropout = config.hidden_dropout
        self.recompute = runtime.recompute == "full"
        self.input_layernorm = Norm(f"{name}.input_layernorm", config.hidden_size, config, runtime)
        self.attention = Attention(f"{name}.attention", layer, config, runtime, rotary)
        self.pre_mlp_layernorm = Norm(f"{name}.pre_mlp_layernorm", config.hidden_size, config, runtime)
        self.mlp = MLP(f"{name}.mlp", config, runtime)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        if self.recompute and self.training:
            # Masks are drawn from the context's seed, so there is no generator state to restore.
            return checkpoint(self._forward, hidden, context, use_reentrant=False, preserve_rng_state=False)
        return self._forward(hidden, context)

    def _forward(self, hidden: Tensor, context: Context) -> Tensor:
        branch = self._drop(self.attention(self.input_layernorm(hidden), context), "attention", context)
        normed, hidden = self.pre_mlp_layernorm(branch, hidden)
        # In place: nothing keeps the branch for the backward pass.
        return self._drop(self.mlp(normed), "mlp", context).add_(hidden)

    def _drop(self, branch: Tensor, place: str, context: Context) -> Tensor:
        if self.dropout == 0 or not self.training:
            return branch
        seed = place_seed(context.dropout_seed, f"{self.name}.{place}")
        return dropout(branch, self.dropout, seed, self.mesh, self.ops, sharded=self.mesh.sequence_parallel)
