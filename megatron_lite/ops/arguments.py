"""What operations take beside tensors of activations."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
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

    @cached_property
    def runs(self) -> "Runs":
        """The runs of equal numbers, as kernels for packed sequences take them; waits for a GPU to count them."""
        s, t = self.queries.size(1), self.keys.size(1)
        first = torch.ones_like(self.keys, dtype=torch.bool)
        first[:, 1:] = self.keys[:, 1:] != self.keys[:, :-1]
        row, column = first.nonzero(as_tuple=True)
        # The queries are the last s of the keys' tokens.
        before = (row * s + (column - (t - s)).clamp(min=0), row * t + column)
        ends = (n * self.keys.size(0) for n in (s, t))
        queries, keys = (F.pad(x, (0, 1), value=end).int() for x, end in zip(before, ends, strict=True))
        longest = torch.stack([queries.diff().max(), keys.diff().max()]).tolist()
        return Runs(queries, keys, *longest)


@dataclass(frozen=True)
class Runs:
    """Documents laid end to end, all rows of the batch after each other; a run may have keys only.

    Attributes:
        queries, keys: [runs + 1] int32, tokens before each run, and all of them.
        longest_queries, longest_keys: tokens of the longest run.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


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
