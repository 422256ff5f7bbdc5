"""Counter-based random numbers in plain torch: Philox4x32-10 (Salmon et al., SC 2011).

A dropout decision is a function of a seed and of the element's global index alone, so that any rank that holds a
slice draws what one rank would for the whole, and recomputation draws it again. The kernels in csrc draw the same
bits.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, as int64, for each counter (int64) under a 64-bit seed."""
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products wrap around at 64 bits; their bits are right all the same.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def dropout_factor(rows: Tensor, cols: int, p: float, seed: int) -> Tensor:
    """0 in a share p of places and 1 / (1 - p) elsewhere (p = 1: 0), fp32.

    Args:
        rows: [...] int64, the global index of the first element of each row of `cols` elements.

    Returns:
        [..., cols].
    """
    if cols % 4 == 0 and not bool((rows % 4).any()):
        counters = (rows // 4).unsqueeze(-1) + torch.arange(cols // 4, device=rows.device)
        words = torch.stack(philox(counters, seed), dim=-1).flatten(-2)
    else:
        index = rows.unsqueeze(-1) + torch.arange(cols, device=rows.device)
        words = (
            torch.stack(philox(index // 4, seed), dim=-1).gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)
        )
    kept = words >= min(int(p * 2**32), 2**32)
    return kept.float() * (1 / (1 - p) if p < 1 else 0.0)
