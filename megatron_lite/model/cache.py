"""Keys and values of the tokens already seen, for generation."""

import torch
from torch import Tensor

from megatron_lite.config import ModelConfig
from megatron_lite.model.runtime import Runtime


class KVCache:
    """Room for `capacity` tokens a row in every block; this tensor rank's key/value heads only.

    Each forward pass stands between `begin`, which says how many tokens it computes, and `end`.

    Args:
        segments: [batch, capacity] segment of every token to come (see `Context`), where rows are padded; None: one
            document a row.
    """

    def __init__(
        self, config: ModelConfig, runtime: Runtime, batch: int, capacity: int, segments: Tensor | None = None
    ) -> None:
        groups = config.query_groups // runtime.mesh.tensor_size
        shape = (config.num_layers, 2, batch, groups, capacity, config.head_dim)
        self._store = torch.empty(shape, dtype=runtime.dtype, device=runtime.device)
        self._segments = segments
        self.capacity = capacity
        self.length = 0  # tokens complete in every block
        self._end = 0  # with those of the pass under way

    def begin(self, count: int) -> None:
        """Announces the next `count` tokens of every row.

        Raises:
            ValueError: they do not fit.
        """
        if self.length + count > self.capacity:
            raise ValueError(f"{self.length + count} tokens do not fit in a cache made for {self.capacity}")
        self._end = self.length + count

    def end(self) -> None:
        """Marks the announced tokens as seen."""
        self.length = self._end

    @property
    def segments(self) -> Tensor | None:
        """[batch, t] segments of the cached and the announced tokens; None: one document a row."""
        return None if self._segments is None else self._segments[:, : self._end]

    @property
    def new_segments(self) -> Tensor | None:
        """[batch, s] segments of the announced tokens; None: one document a row."""
        return None if self._segments is None else self._segments[:, self.length : self._end]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one block's new keys and values [b, groups, s, d] and returns all of them [b, groups, t, d]."""
        keys, values = self._store[layer, :, :, :, : self._end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values
