"""Rotary position embedding: the angles, with the published ways to stretch them for long contexts.

Sources: Su et al. 2021 (arXiv:2104.09864); linear interpolation, Chen et al. 2023 (arXiv:2306.15595); YaRN, Peng et
al. 2023 (arXiv:2309.00071); the frequency rule of Llama 3.1 as its model card's configuration defines it.
"""

import math

import torch
from torch import Tensor

from megatron_lite.config import ModelConfig, RotaryScaling


class Rotary:
    """Tables of cosine and sine, shared by all blocks. Not a parameter, never saved.

    They are made when first needed, not with the model: DeepSpeed's zero.Init, under which a model may be built,
    changes the dtype of new tensors, and bf16 frequencies would turn far positions by whole radians.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor | None, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, fp32: [limit, dim] for positions 0 to limit-1, or [b, 1, s, dim] for given ones.

        `limit` is above every position; it is given, because asking the tensor would make the CPU wait for a GPU.
        """
        if self._table is None or self._table[0].size(0) < limit or self._table[0].device != device:
            self._table = self._make_table(limit, device)
        cos, sin = self._table
        if positions is None:
            return cos[:limit], sin[:limit]
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def _make_table(self, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
        config, rows = self.config, self.config.max_positions
        while rows < limit:  # twice as long, not longer by one, when a text is generated
            rows *= 2
        frequencies, magnitude = rotary_frequencies(
            config.rotary_dim, config.rotary_base, config.rotary_scaling, config.max_positions
        )
        angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * magnitude).to(device), (angles.sin() * magnitude).to(device)


def rotary_frequencies(
    dim: int, base: float, scaling: RotaryScaling | None, max_positions: int
) -> tuple[Tensor, float]:
    """Angular frequencies, [dim/2] fp32 in radians a token, and the factor on cosine and sine."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    original = scaling.original_max_position_embeddings or max_positions
    if scaling.type == "llama3":
        turns = original * frequencies / (2 * math.pi)  # over the original context
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        return frequencies * keep + frequencies / scaling.factor * (1 - keep), 1.0

    def dimension_of(turns: float) -> float:
        """The pair of features that makes this many turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    ramp = ramp.clamp(0, 1)
    scaled = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
    return scaled, 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
