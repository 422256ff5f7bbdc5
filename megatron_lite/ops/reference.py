"""Every operation in plain torch: the definition that other implementations are judged against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the last dimension; statistics in fp32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension; statistics in fp32."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def gelu(x: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), exact."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): [..., 2f], gate then up -> [..., f]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split convention of GPT-NeoX and Llama.

    Args:
        x: [b, heads, s, d]; the first r = cos.size(-1) features of d are rotated, the rest pass.
        cos, sin: [s, r] or [b, 1, s, r], fp32.
    """
    rotated, passed = x[..., : cos.size(-1)], x[..., cos.size(-1) :]
    first, second = rotated.float().chunk(2, dim=-1)
    turned = rotated.float() * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), passed), dim=-1) if passed.size(-1) else turned.to(x.dtype)


def expand_groups(x: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: [b, groups, s, d] -> [b, heads, s, d], each group serving heads/groups heads."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout_mask: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention; softmax in fp32.

    Args:
        q: [b, heads, s, d]; k, v: [b, groups, t, d] with groups dividing heads (grouped-query attention).
        mask: bool, broadcastable to [b, heads, s, t], True where attention is allowed; None: causal, the last
            query seeing every key.
        dropout_mask: factor on the probabilities, [b, heads, s, t].

    Returns:
        [b, heads, s, d].
    """
    k, v = expand_groups(k, q.size(1)), expand_groups(v, q.size(1))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.size(-1))
    if mask is None:
        s, t = scores.shape[-2:]
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
    probabilities = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(q.dtype)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask
    return probabilities @ v
