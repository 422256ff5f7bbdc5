"""Attention through torch's scaled_dot_product_attention (flash, cuDNN or efficient kernels, as torch chooses)."""

import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import reference
from megatron_lite.ops.arguments import Documents, ProbabilityDropout, causal_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """The same function as `reference.attention`.

    Falls back to the reference where probabilities are dropped: torch would draw the mask from its own generator,
    differently on every layout.
    """
    if dropout is not None:
        return reference.attention(q, k, v, documents=documents, dropout=dropout)
    s, t = q.size(2), k.size(2)
    mask = None if documents is None else documents.mask
    if mask is None and 1 < s != t:  # is_causal would align the triangle to the first key
        mask = causal_mask(s, t, q.device)
    gqa = k.size(1) != q.size(1)
    if gqa and not q.is_cuda:  # torch's CPU flash kernel takes no grouped heads
        k, v, gqa = reference.expand_groups(k, q.size(1)), reference.expand_groups(v, q.size(1)), False
    # A single query sees every key and needs no mask.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and s > 1, enable_gqa=gqa
    )
