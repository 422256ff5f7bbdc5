"""Every operation in plain torch: the definition that other implementations are judged against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops.arguments import Documents, ProbabilityDropout, causal_mask
from megatron_lite.ops.philox import dropout_factor

_CHUNK = 1024
"""Rows of logits that exist a second time, in fp32, while their gradient is computed."""


def _wide(x: Tensor) -> Tensor:
    """x in fp32, in which statistics are taken; fp64 stays, for checks of gradients."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the last dimension; statistics in fp32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension; statistics in fp32."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of sum = x + residual, and that sum, which goes on as the residual stream."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of sum = x + residual, and that sum, which goes on as the residual stream."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), exact, of x + bias; bias [f] for x [..., f]."""
    return F.gelu(x if bias is None else x + bias)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh approximation, as GPT-2 has it, of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202) of x + bias: [..., 2f], gate then up -> [..., f]."""
    gate, up = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split convention of GPT-NeoX and Llama.

    Args:
        q: [b, heads, s, d]; k: [b, groups, s, d]; the first r = cos.size(-1) features of d are rotated, the rest pass.
        cos, sin: [s, r] or [b, 1, s, r], fp32.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, passed = x[..., : cos.size(-1)], x[..., cos.size(-1) :]
    wide = _wide(rotated)
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), passed), dim=-1) if passed.size(-1) else turned.to(x.dtype)


def dropout(x: Tensor, p: float, seed: int, *, offset: int = 0, row_stride: int | None = None) -> Tensor:
    """Zeroes elements with probability p and scales the rest by 1 / (1 - p); none of torch's generators is used.

    Args:
        x: [n, ...]; element (r, c) of its view as n rows has the global index offset + r * row_stride + c.
        seed: decides, with the global index, what is dropped.
        row_stride: None: the length of a row.
    """
    cols = x[0].numel() if x.size(0) else 0
    first = offset + torch.arange(x.size(0), device=x.device) * (cols if row_stride is None else row_stride)
    # The factor stays in fp32: in bf16, 1 / (1 - p) would be off by up to 0.4%, for all elements the same way.
    return (x * dropout_factor(first, cols, p, seed).view_as(x)).to(x.dtype)


def expand_groups(x: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: [b, groups, s, d] -> [b, heads, s, d], each group serving heads/groups heads."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    documents: Documents | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax of scaled scores [b, heads, s, t] over the keys a query may see, in fp32; 0 where it may see none.

    Args:
        mask: bool, broadcastable to x, True where attention is allowed.
    """
    seen = causal_mask(x.size(-2), x.size(-1), x.device) if causal else None
    if documents is not None:
        same = (documents.queries.unsqueeze(-1) == documents.keys.unsqueeze(-2)).unsqueeze(1)
        seen = same if seen is None else same & seen
    if mask is not None:
        seen = mask if seen is None else mask & seen
    scores = _wide(x) * scale
    if seen is None:
        return scores.softmax(dim=-1).to(x.dtype)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return probabilities.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """Causal scaled dot-product attention, the last query seeing the last key; softmax in fp32.

    Args:
        q: [b, heads, s, d]; k, v: [b, groups, t, d] with groups dividing heads (grouped-query attention).

    Returns:
        [b, heads, s, d]; zeros for a query that sees no key.
    """
    k, v = expand_groups(k, q.size(1)), expand_groups(v, q.size(1))
    probabilities = softmax(q @ k.transpose(-1, -2), scale=1 / math.sqrt(q.size(-1)), documents=documents)
    if dropout is not None:
        probabilities = (probabilities * probability_factor(probabilities, dropout)).to(q.dtype)
    return probabilities @ v


def probability_factor(probabilities: Tensor, dropout: ProbabilityDropout) -> Tensor:
    """The factor by which `dropout` multiplies probabilities [b, heads, s, t], of the same shape, in fp32."""
    b, heads, s, t = probabilities.shape
    batch, head, query = (torch.arange(n, device=probabilities.device) for n in (b, heads, s))
    rows = batch.view(-1, 1, 1) * (dropout.heads or heads) + dropout.first_head + head.view(-1, 1)
    return dropout_factor((rows * s + query) * t, t, dropout.p, dropout.seed)


def cross_entropy_stats(
    logits: Tensor, labels: Tensor, start: int, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a softmax over a slice of the vocabulary contributes to the whole: three fp32 numbers a row.

    Args:
        logits: [n, c], of which the first `valid` columns are the tokens start, start + 1, ...; the rest is padding.
        labels: [n] int64.

    Returns:
        Largest logit, sum of exp(logit - largest), and the label's logit (0 where it is not in this slice).
    """
    if valid == 0:
        none = torch.zeros(logits.size(0), device=logits.device)
        return torch.full_like(none, -torch.inf), none, none.clone()
    columns = _wide(logits[:, :valid])
    largest = columns.amax(dim=-1)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    total = (columns - shift.unsqueeze(-1)).exp_().sum(dim=-1)
    mine = (labels >= start) & (labels < start + valid)
    local = (labels - start).clamp(0, valid - 1).unsqueeze(-1)
    return largest, total, torch.where(mine, columns.gather(-1, local).squeeze(-1), 0.0)


def cross_entropy_grad(
    logits: Tensor,
    labels: Tensor,
    largest: Tensor,
    total: Tensor,
    grad: Tensor,
    start: int,
    valid: int,
    z_loss: float,
) -> Tensor:
    """Gradient of sum(grad * (lse - label's logit + z_loss * lse^2)), lse = largest + log(total); zeros in the padding.

    `largest` and `total` are those of the whole vocabulary. Overwrites the logits with the gradient and returns them;
    rows are taken in chunks, so that no second tensor of the size of the logits exists.
    """
    scale = grad * (1 + 2 * z_loss * (largest + total.log())) / total
    mine = (labels >= start) & (labels < start + valid)
    local = (labels - start).clamp(0, max(valid - 1, 0)).unsqueeze(-1)
    logits[:, valid:] = 0
    for rows in range(0, logits.size(0) if valid else 0, _CHUNK):
        part = slice(rows, rows + _CHUNK)
        gradient = (_wide(logits[part, :valid]) - largest[part, None]).exp_().mul_(scale[part, None])
        gradient.scatter_add_(-1, local[part], torch.where(mine, -grad, 0.0)[part, None])
        logits[part, :valid] = gradient
    return logits
