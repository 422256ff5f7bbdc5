"""What a model is built with (`Runtime`), and what goes beside the activations through one forward pass (`Context`)."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_lite.ops import Documents, Ops
from megatron_lite.parallel.layers import Build
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import derive_seed
from megatron_lite.parallel.random import Clock

if TYPE_CHECKING:
    from megatron_lite.model.cache import KVCache


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types by their names in the configuration (`train.precision`)."""


@dataclass(frozen=True)
class Runtime:
    """Where and how a model runs: everything about it that is not its shape.

    Attributes:
        recompute: which activations are computed again in the backward pass instead of being kept.
        clock: the step and micro-batch that dropout masks are drawn for.
    """

    mesh: Mesh = field(default_factory=Mesh)
    ops: Ops = field(default_factory=Ops)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 1234
    recompute: Literal["none", "selective", "full"] = "none"
    clock: Clock = field(default_factory=Clock)

    @property
    def build(self) -> Build:
        """The part of it that parameters are made with."""
        return Build(self.mesh, self.seed, self.dtype, self.device, self.ops.linear)

    def context(
        self, positions: Tensor | None = None, segments: Tensor | None = None, cache: "KVCache | None" = None
    ) -> "Context":
        """A context for the micro-batch the clock stands at."""
        seed = derive_seed(self.seed, "dropout", self.clock.step, self.clock.micro_batch)
        return Context(positions, segments, cache, seed)


@dataclass(frozen=True)
class Context:
    """What accompanies the activations of one forward pass; every layer reads it, none changes it.

    Attributes:
        positions: [b, s] position of each token; None: 0 to s-1.
        segments: [b, s] number of each token's document, or None for one document a row. Attention stays within a
            segment. A negative segment is padding, which only padding attends to.
        cache: keys and values of earlier tokens, while generating.
        dropout_seed: stands for (run seed, step, micro-batch).
    """

    positions: Tensor | None = None
    segments: Tensor | None = None
    cache: "KVCache | None" = None
    dropout_seed: int = 0

    @cached_property
    def documents(self) -> Documents | None:
        """The segments as attention takes them; None where plain causal attention is meant."""
        if self.segments is None:
            return None
        queries = self.segments.int().contiguous()
        if self.cache is None:
            return Documents(queries, queries)
        assert self.cache.segments is not None, "segments for the new tokens, but none for those in the cache"
        return Documents(queries, self.cache.segments.int().contiguous())
