"""Cross entropy over a vocabulary split over the tensor ranks; the logits are never gathered.

Source: Megatron-LM (arXiv:1909.08053, section 3). What crosses the network is three numbers a token: the largest
logit, the label's logit and the sum of exponentials.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_lite.parallel.mesh import Mesh


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
        start = mesh.tensor_rank * logits.size(-1)
        real = max(0, min(vocab_size - start, logits.size(-1)))  # columns that are not vocabulary padding
        shifted = logits.float()
        if real < logits.size(-1):
            shifted = shifted.clone() if shifted is logits else shifted
            shifted[..., real:] = -torch.inf
        largest = shifted.amax(dim=-1)
        if mesh.tensor_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.tensor_group)
        shifted = shifted - largest.unsqueeze(-1)
        local = (labels - start).clamp(0, logits.size(-1) - 1).unsqueeze(-1)
        mine = ((labels >= start) & (labels < start + real)).unsqueeze(-1)
        label_logit = torch.where(mine, shifted.gather(-1, local), 0.0)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        if mesh.tensor_size > 1:
            both = torch.cat([total, label_logit], dim=-1)
            dist.all_reduce(both, group=mesh.tensor_group)
            total, label_logit = both[..., :1], both[..., 1:]
        probabilities = exponentials.div_(total)
        ctx.save_for_backward(probabilities, local, mine)
        ctx.dtype = logits.dtype
        return (total.log() - label_logit).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # The probabilities become the gradient in place: they are not needed again.
        gradient, local, mine = ctx.saved_tensors
        gradient.scatter_add_(-1, local, -mine.to(gradient.dtype))
        gradient.mul_(grad.unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    """Negative log likelihood of each label, in fp32, the same on every tensor rank.

    Args:
        logits: [..., V/t], this rank's columns; those at or beyond `vocab_size` are padding and take no part.
        labels: [...] int64 in [0, vocab_size).
        vocab_size: number of real tokens, the padded size being V.

    Returns:
        [...] fp32 losses in nats, not reduced.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, mesh, vocab_size)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    """Scalar loss of one micro-batch: the token losses summed with given weights.

    The weights carry the mask and the normalisation by the number of tokens of the whole global batch, so that
    masked micro-batches of different token counts weigh as they should; a mean of means would not.

    Args:
        logits: [b, s, V/t]; labels: [b, s]; weights: [b, s] fp32.
    """
    return (vocab_parallel_cross_entropy(logits, labels, mesh, vocab_size) * weights).sum()
