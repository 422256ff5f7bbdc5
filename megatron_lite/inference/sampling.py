"""From logits to the next token: temperature, then top-k, then top-p."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.parallel.parameter import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: the logits are divided by it; 0: always the most likely token.
        top_k: draw among this many of the most likely tokens; 0: all.
        top_p: nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751): draw among the most likely tokens whose
            probabilities, after top-k, sum to at least this; 1: all.
        seed: of the draws; each row has a generator of its own, so a row does not depend on the others.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give more than 0 and at most 1 (off)")

    def draws(self, first_row: int, rows: int, steps: int) -> Tensor:
        """[rows, steps] uniform numbers in [0, 1), float64 on the CPU, one for each token to come."""
        out = torch.empty(rows, steps, dtype=torch.float64)
        for row in range(rows):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "generate", first_row + row))
            out[row].uniform_(generator=generator)
        return out

    def choose(self, logits: Tensor, draw: Tensor) -> Tensor:
        """The next tokens, [b] int64.

        Args:
            logits: [b, V] of real tokens.
            draw: [b] uniform numbers in [0, 1), float64.

        Raises:
            ValueError: a row of logits is not a number anywhere.
        """
        if bool(logits.isnan().any()):
            raise ValueError("the model's logits are not numbers (NaN): it diverged, or needs another dtype")
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # Stable, so that of equally likely tokens the lowest ids come first; float64, so that sums do not round.
        logits, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
        if 0 < self.top_k < logits.size(-1):
            logits, tokens = logits[:, : self.top_k], tokens[:, : self.top_k]
        probabilities = ((logits - logits[:, :1]) / self.temperature).softmax(dim=-1)
        reached = probabilities.cumsum(dim=-1)
        # A token stays while those before it do not reach top_p, so the most likely one always does.
        kept = (reached - probabilities < self.top_p) & (probabilities > 0)
        last = kept.sum(dim=-1, keepdim=True) - 1
        target = draw.to(reached.device).unsqueeze(-1) * reached.gather(-1, last)
        place = torch.searchsorted(reached, target, right=True).minimum(last)
        return tokens.gather(-1, place).squeeze(-1)
