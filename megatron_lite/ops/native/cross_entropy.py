"""The two halves of cross entropy over a slice of the vocabulary; neither is differentiable by itself."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_lite.ops.native.kernels import launch
from megatron_lite.ops.native.operator import define


def _stats(logits: Tensor, labels: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, rows = logits.contiguous(), logits.size(0)
    largest, total, label_logit = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    launch(
        "cross_entropy_stats", logits, rows, logits.size(1), valid, start, logits, labels.contiguous(), largest,
        total, label_logit,
    )  # fmt: skip
    return largest, total, label_logit


def _grad(
    logits: Tensor,
    labels: Tensor,
    largest: Tensor,
    total: Tensor,
    grad: Tensor,
    start: int,
    valid: int,
    z_loss: float,
) -> None:
    launch(
        "cross_entropy_grad", logits, *logits.shape, valid, start, logits, labels.contiguous(), largest.contiguous(),
        total.contiguous(), grad.contiguous(), z_loss,
    )  # fmt: skip


_stats_operator = define("cross_entropy_stats", _stats)
_grad_operator = define("cross_entropy_grad", _grad, mutates=("logits",))


def cross_entropy_stats(
    logits: Tensor, labels: Tensor, start: int, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.cross_entropy_stats`."""
    _check(logits, labels, valid)
    run = _stats_operator if torch.compiler.is_compiling() else _stats
    found: tuple[Tensor, Tensor, Tensor] = run(logits.detach(), labels, start, valid)
    return found


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
    """`reference.cross_entropy_grad`; logits that are not contiguous stay as they are."""
    _check(logits, labels, valid)
    for name, numbers in (("largest", largest), ("total", total), ("grad", grad)):
        if numbers.shape != labels.shape or numbers.dtype != torch.float32:
            given = f"{numbers.dtype} {tuple(numbers.shape)}"
            raise ValueError(f"{name} is {given}; it must be float32 {tuple(labels.shape)}")
    logits = logits.detach().contiguous()
    arguments = (logits, labels, largest, total, grad, start, valid, z_loss)
    if torch.compiler.is_compiling():
        _grad_operator(*arguments)
    else:
        _grad(*arguments)
        increment_version(logits)  # so that autograd notices if anything else meant to read them
    return logits


def _check(logits: Tensor, labels: Tensor, valid: int) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        given = f"{tuple(logits.shape)} and {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"logits must be [n, c] and labels int64 [n], not {given}")
    if not 0 <= valid <= logits.size(1):
        raise ValueError(f"valid = {valid} of {logits.size(1)} columns")
