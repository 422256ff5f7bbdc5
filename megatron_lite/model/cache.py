"""Keys and values of the tokens already seen, for generation."""

import torch
from torch import Tensor


class KVCache:
    """Room for `capacity` tokens of every block; this tensor rank's key/value heads only.

    Args:
        layers: number of transformer blocks.
        batch: rows.
        groups: key/value heads held by this rank.
        capacity: largest number of tokens.
        head_dim: features of a head.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        groups: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, batch, groups, capacity, head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self._segments = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.capacity = capacity
        self.length = 0  # tokens complete in every block
        self._new = 0

    def begin(self, segments: Tensor) -> None:
        """Announces the next tokens, [b, s], before the forward pass that computes them.

        Raises:
            ValueError: they do not fit.
        """
        self._new = segments.size(1)
        if self.length + self._new > self.capacity:
            raise ValueError(
                f"{self.length + self._new} tokens do not fit in a cache made for {self.capacity}"
            )
        self._segments[:, self.length : self.length + self._new] = segments

    def end(self) -> None:
        """Marks the announced tokens as seen, after the forward pass."""
        self.length += self._new
        self._new = 0

    @property
    def segments(self) -> Tensor:
        """[b, t] segments of the cached and the announced tokens."""
        return self._segments[:, : self.length + self._new]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one block's new keys and values [b, groups, s, d] and returns all of them [b, groups, t, d]."""
        end = self.length + self._new
        self._store[layer, 0, :, :, self.length : end] = k
        self._store[layer, 1, :, :, self.length : end] = v
        return self._store[layer, 0, :, :, :end], self._store[layer, 1, :, :, :end]
