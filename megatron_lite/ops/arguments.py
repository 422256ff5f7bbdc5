"""What operations take beside tensors of activations."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Which document each token belongs to: attention stays within equal numbers, which need not be neighbours.

    Attributes:
        queries: [b, s] int32, contiguous.
        keys: [b, t] int32, contiguous; the same tensor as `queries` unless there are earlier, cached tokens.
    """

    queries: Tensor
    keys: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """[b, 1, s, t] bool, True where attention is allowed: the same document, and causal."""
        same = self.queries.unsqueeze(-1) == self.keys.unsqueeze(-2)
        return (same & causal_mask(same.size(-2), same.size(-1), same.device)).unsqueeze(1)


@dataclass(frozen=True)
class ProbabilityDropout:
    """Dropout of attention probabilities, of which a tensor rank holds a slice of the heads.

    Probability (batch, head, query, key) has the global index
    ((batch * heads + first_head + head) * queries + query) * keys + key; `seed` and that index alone decide.

    Attributes:
        p: share of the probabilities dropped; the others are scaled by 1 / (1 - p).
        first_head: number of this rank's first head among all.
        heads: number of heads of all ranks; 0: those of the tensor at hand.
    """

    p: float
    seed: int
    first_head: int = 0
    heads: int = 0


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool, True where a query may see a key; the last query sees the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
