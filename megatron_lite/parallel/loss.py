"""Cross entropy over a vocabulary split over the tensor ranks; the logits are never gathered.

Source: Megatron-LM (arXiv:1909.08053, section 3). What crosses the network is three numbers a token: the largest
logit, the label's logit and the sum of exponentials.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_lite.ops import Ops
from megatron_lite.parallel.mesh import Mesh


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, mesh: Mesh, vocab_size: int, ops: Ops, z_loss: float
    ) -> Tensor:
        flat, labels = logits.flatten(0, -2), labels.flatten()
        start = mesh.tensor_rank * flat.size(-1)
        valid = max(0, min(vocab_size - start, flat.size(-1)))  # columns that are not vocabulary padding
        largest, total, label_logit = ops.cross_entropy_stats(flat, labels, start, valid)
        if mesh.tensor_size > 1:
            local = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.tensor_group)
            # A rank of nothing but padding has the sum 0 and -inf as its largest logit.
            both = torch.stack([total * (local - largest).exp(), label_logit])
            dist.all_reduce(both, group=mesh.tensor_group)
            total, label_logit = both
        ctx.save_for_backward(flat, labels, largest, total)
        ctx.shape, ctx.slice, ctx.ops, ctx.z_loss = logits.shape, (start, valid), ops, z_loss
        loss = total.log() + (largest - label_logit)
        if z_loss:
            loss += z_loss * (largest + total.log()).square()
        return loss.view(ctx.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The logits become the gradient in place: nothing needs them any more.
        flat, labels, largest, total = ctx.saved_tensors
        weights = grad.flatten().float().contiguous()
        gradient = ctx.ops.cross_entropy_grad(flat, labels, largest, total, weights, *ctx.slice, ctx.z_loss)
        return gradient.view(ctx.shape), None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, mesh: Mesh, vocab_size: int, ops: Ops, *, z_loss: float = 0.0
) -> Tensor:
    """Negative log likelihood of each label, in fp32, the same on every tensor rank.

    The backward pass overwrites the logits by their gradient, so that no second tensor of their size exists: once
    it has run, they are not to be read, nor is it to be run again.

    Args:
        logits: [..., V/t], this rank's columns; those at or beyond `vocab_size` are padding and take no part.
        labels: [...] int64 in [0, vocab_size).
        vocab_size: number of real tokens, the padded size being V.
        z_loss: factor of log(Z)^2 added to each loss, Z being the sum of exponentials, which keeps the logits from
            drifting (PaLM, arXiv:2204.02311, section 5).

    Returns:
        [...] fp32 losses in nats, not reduced.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, mesh, vocab_size, ops, z_loss)


def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    mesh: Mesh,
    vocab_size: int,
    ops: Ops,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Scalar loss of one micro-batch: the token losses summed with given weights.

    The weights carry the mask and the normalisation by the number of tokens of the whole global batch, so that
    masked micro-batches of different token counts weigh as they should; a mean of means would not.

    Args:
        logits: [b, s, V/t]; labels: [b, s]; weights: [b, s] fp32.
    """
    losses = vocab_parallel_cross_entropy(logits, labels, mesh, vocab_size, ops, z_loss=z_loss)
    return (losses * weights).sum()
