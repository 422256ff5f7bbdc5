"""Attention through torch's scaled_dot_product_attention, with the kernel that torch chooses or with a given one."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lite.ops import reference
from megatron_lite.ops.arguments import Documents, ProbabilityDropout, causal_mask
from megatron_lite.ops.backends import Needs, name_of

_PROBES = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
}


def lacks(group: str, needs: Needs, kernel: SDPBackend | None = None) -> Iterator[str]:
    yield from needs.lacks_own_dropout()
    if kernel is None:
        return
    efficient = kernel == SDPBackend.EFFICIENT_ATTENTION
    yield from needs.lacks_gpu((5, 0) if efficient else (8, 0))
    if not efficient:
        yield from needs.lacks_tensor_cores()
        if needs.documents != "none":
            yield "it takes documents, if at all, as a mask of queries x keys in memory"
    if needs.capability is not None and torch.cuda.is_available() and not _probe(kernel, needs):
        yield f"torch refuses it for head_dim {needs.head_dim} in {name_of(needs.dtype)} on this GPU"


def _probe(kernel: SDPBackend, needs: Needs) -> bool:
    """Whether torch would use a kernel for tensors like the run's."""
    q = torch.empty(1, 2, 128, needs.head_dim, dtype=needs.dtype, device="cuda", requires_grad=True)
    grouped = needs.grouped and kernel != SDPBackend.EFFICIENT_ATTENTION
    k = q.detach()[:, : 1 if grouped else 2].requires_grad_()
    return bool(_PROBES[kernel](torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, grouped)))


def load(group: str, kernel: SDPBackend | None = None) -> dict[str, Callable[..., Tensor]]:
    return {"attention": attention if kernel is None else partial(attention, kernel=kernel)}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    dropout: ProbabilityDropout | None = None,
    kernel: SDPBackend | None = None,
) -> Tensor:
    """The same function as `reference.attention`, without dropout.

    Args:
        kernel: the only one that torch may use.
    """
    assert dropout is None, "a run with attention dropout does not get this backend"
    s, t = q.size(2), k.size(2)
    mask = None if documents is None else documents.mask
    if mask is None and 1 < s != t:  # is_causal would align the triangle to the first key
        mask = causal_mask(s, t, q.device)
    gqa = k.size(1) != q.size(1)
    if gqa and (not q.is_cuda or kernel == SDPBackend.EFFICIENT_ATTENTION):  # kernels without grouped heads
        k, v, gqa = reference.expand_groups(k, q.size(1)), reference.expand_groups(v, q.size(1)), False
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        # A single query sees every key and needs no mask.
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and s > 1, enable_gqa=gqa
        )
