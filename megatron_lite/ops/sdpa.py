"""Attention through torch's scaled_dot_product_attention (flash, cuDNN or efficient kernels, as torch chooses)."""

import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import reference


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout_mask: Tensor | None = None
) -> Tensor:
    """The same function as `reference.attention`.

    Falls back to the reference where probabilities are dropped: torch would draw the mask from its own generator,
    differently on every layout.
    """
    if dropout_mask is not None:
        return reference.attention(q, k, v, mask=mask, dropout_mask=dropout_mask)
    # is_causal aligns the triangle to the first key, so it serves only when queries and keys are the same tokens;
    # a single query that sees every key needs no mask.
    causal = mask is None and q.size(2) > 1
    if causal and q.size(2) != k.size(2):
        return reference.attention(q, k, v)
    gqa = k.size(1) != q.size(1)
    if gqa and not q.is_cuda:  # torch's CPU flash kernel takes no grouped heads
        k, v, gqa = reference.expand_groups(k, q.size(1)), reference.expand_groups(v, q.size(1)), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
