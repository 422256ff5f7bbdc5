"""Vocab-parallel cross entropy against torch's on the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import Ops
from megatron_lite.parallel.loss import vocab_parallel_cross_entropy, weighted_loss
from megatron_lite.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_ranks

SHAPE = (2, 5)


def whole(vocab: int, padded: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with padding columns that must not matter, labels that include the first and the last token, weights."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(*SHAPE, padded, generator=generator)
    if kind == "extreme":
        logits *= 1e4
        logits[0, 0, :] = -1e30
        logits[0, 1, 0] = 1e30
    logits[..., vocab:] = 1e5
    labels = torch.randint(vocab, SHAPE, generator=generator)
    labels[0, :2] = torch.tensor([0, vocab - 1])
    return logits, labels, torch.rand(SHAPE, generator=generator)


def on_ranks(
    tensor: int, vocab: int, padded: int, kind: str, dtype: torch.dtype, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    mesh = build_mesh(tensor) if tensor > 1 else Mesh()
    logits, labels, weights = whole(vocab, padded, kind)
    mine = logits.to(dtype).chunk(tensor, -1)[mesh.tensor_rank].clone().requires_grad_()
    before = mine.detach().clone()
    losses = vocab_parallel_cross_entropy(mine, labels, mesh, vocab, Ops(), z_loss=z_loss)
    assert torch.equal(mine, before), "the forward pass changed the logits"
    (losses * weights).sum().backward()
    assert mine.grad is not None and mine.grad.dtype == dtype
    return losses.detach(), mine.grad


CASES = [
    (1, 7, 7),
    (1, 7, 8),
    (2, 16, 16),
    (2, 13, 16),  # padding within a rank
    (4, 16, 16),
    (4, 9, 32),  # one real column on a rank, then ranks of padding only
    (4, 1, 4),
]


@pytest.mark.parametrize("kind", ["normal", "extreme"])
@pytest.mark.parametrize(("tensor", "vocab", "padded"), CASES)
def test_against_torch(tensor: int, vocab: int, padded: int, kind: str) -> None:
    logits, labels, weights = whole(vocab, padded, kind)
    real = logits[..., :vocab].double().requires_grad_()
    expected = F.cross_entropy(real.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE)
    (expected * weights).sum().backward()
    assert real.grad is not None
    gradient = F.pad(real.grad, (0, padded - vocab)).chunk(tensor, -1)
    for rank, (losses, mine) in enumerate(
        run_ranks(tensor, on_ranks, tensor, vocab, padded, kind, torch.float32)
    ):
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(mine.double(), gradient[rank], rtol=1e-5, atol=1e-6)


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits, labels, _ = whole(50, 64, "normal")
    low = logits[..., :50].bfloat16().float()
    expected = F.cross_entropy(low.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE)
    for losses, _ in run_ranks(2, on_ranks, 2, 50, 64, "normal", torch.bfloat16):
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


def test_weighted_loss() -> None:
    logits, labels, weights = whole(13, 16, "normal")
    weights[1] = 0
    expected = F.cross_entropy(logits[0, :, :13], labels[0], reduction="none") @ weights[0]
    found = weighted_loss(logits, labels, weights, Mesh(), 13, Ops())
    assert found.shape == () and found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("tensor", [1, 2])
def test_z_loss(tensor: int) -> None:
    """PaLM's auxiliary term, over the whole vocabulary, in value and gradient."""
    logits, labels, weights = whole(13, 16, "normal")
    real = logits[..., :13].double().requires_grad_()
    expected = F.cross_entropy(real.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE)
    expected = expected + 0.1 * real.logsumexp(-1).square()
    (expected * weights).sum().backward()
    assert real.grad is not None
    gradient = F.pad(real.grad, (0, 3)).chunk(tensor, -1)
    ranks = run_ranks(tensor, on_ranks, tensor, 13, 16, "normal", torch.float32, 0.1)
    for rank, (losses, mine) in enumerate(ranks):
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(mine.double(), gradient[rank], rtol=1e-5, atol=1e-6)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    logits, labels, weights = whole(13, 16, "normal")
    logits.requires_grad_()
    inner = logits * 1
    weighted_loss(inner, labels, weights, Mesh(), 13, Ops()).backward()
    assert logits.grad is not None and torch.equal(inner, logits.grad)
