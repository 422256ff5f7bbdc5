"""Gradients of the reference operations in float64, against differences of their values."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_lite.ops import Documents, ProbabilityDropout, reference
from tests.ops.native.cases import documents


def new(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


X, ROWS, WEIGHT, BIAS = new(2, 3, 6), new(2, 3, 6, seed=1), new(6, seed=2), new(6, seed=3)
HEADS, KEYS, VALUES = new(1, 4, 3, 6), new(1, 2, 5, 6, seed=1), new(1, 2, 5, 6, seed=2)
ANGLES = new(3, 4).detach()
ALONE = Documents(torch.tensor([[1, 1, 2]]).int(), torch.tensor([[0, 0, 0, 1, 2]]).int())
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "layer_norm": ((X, WEIGHT, BIAS, 1e-5), {}),
    "layer_norm, no bias": ((X, WEIGHT, None, 1e-5), {}),
    "rms_norm": ((X, WEIGHT, 1e-5), {}),
    "add_layer_norm": ((X, ROWS, WEIGHT, BIAS, 1e-5), {}),
    "add_rms_norm": ((X, ROWS, WEIGHT, 1e-5), {}),
    "gelu": ((X, BIAS), {}),
    "gelu_tanh": ((X, BIAS), {}),
    "swiglu": ((X, BIAS), {}),
    "swiglu, no bias": ((X,), {}),
    "rotary": ((HEADS, HEADS, ANGLES.cos(), ANGLES.sin()), {}),
    "softmax": ((HEADS,), {"scale": 0.7}),
    "softmax, mask": ((HEADS,), {"causal": False, "mask": torch.arange(18).view(3, 6) % 5 > 1}),
    "softmax, documents": ((new(1, 4, 3, 5),), {"documents": ALONE}),
    "dropout": ((X, 0.4, 1), {"offset": 3, "row_stride": 40}),
    "attention": ((HEADS, KEYS, VALUES), {}),
    "attention, documents": ((HEADS, KEYS, VALUES), {"documents": documents(1, 3, 5)}),
    "attention, alone": ((HEADS, KEYS, VALUES), {"documents": ALONE}),
    "attention, dropout": ((HEADS, KEYS, VALUES), {"dropout": ProbabilityDropout(0.4, 1, 2, 8)}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    inputs, given = CASES[case]
    function = getattr(reference, case.partition(",")[0])
    assert gradcheck(lambda *inputs: function(*inputs, **given), inputs)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradient_of_cross_entropy(z_loss: float) -> None:
    """The two halves together are a loss and its gradient; the vocabulary's last two columns are padding."""
    labels, weights = torch.tensor([0, 4, 2]), new(3, seed=1).detach()

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            largest, total, label = reference.cross_entropy_stats(logits, labels, 0, 5)
            ctx.save_for_backward(logits, largest, total)
            lse = largest + total.log()
            return (weights * (lse - label + z_loss * lse.square())).sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            logits, largest, total = ctx.saved_tensors
            return reference.cross_entropy_grad(
                logits.clone(), labels, largest, total, weights * grad, 0, 5, z_loss
            )

    logits = new(3, 7)
    assert gradcheck(Loss.apply, (logits,))
    found = Loss.apply(logits) - z_loss * (weights * logits[:, :5].logsumexp(-1).square()).sum()
    nll = torch.nn.functional.cross_entropy(logits[:, :5], labels, reduction="none")
    torch.testing.assert_close(found, (weights * nll).sum())
