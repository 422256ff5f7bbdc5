"""One call of an operation, as native, reference and float64 compute it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import Documents, native, reference
from tests.csrc.emulation import same_or_better

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {
    "cpu": [torch.float32, torch.bfloat16],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}


@dataclass
class Case:
    """One call.

    Attributes:
        name: of the operation.
        inputs: its first arguments; gradients of the floating-point ones are compared.
        given: its other arguments, by name.
        terms: for each result and each gradient in turn, the size of the terms that cancel in it; 0 beyond the last.
    """

    name: str
    inputs: list[Tensor | None]
    given: dict[str, Any] = field(default_factory=dict)
    terms: Sequence[float] = ()

    def run(
        self,
        function: Callable[..., Any],
        dtype: torch.dtype | None = None,
        needs: Sequence[int] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Results of `function`, and gradients of the inputs (numbers `needs`; None: all) of a weighted sum of them."""
        leaves = [
            None if x is None else x.detach().to(dtype or x.dtype).requires_grad_(needs is None or i in needs)
            for i, x in enumerate(self.inputs)
        ]
        found = function(*leaves, **self.given)
        results = list(found) if isinstance(found, tuple) else [found]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        if not wanted:
            return results, [None] * len(leaves)
        assert self.inputs[0] is not None
        # Rounded as the inputs are, for the exact result, too.
        rounded = [weights(y).to(self.inputs[0].dtype).to(y.dtype) for y in results]
        grads = iter(torch.autograd.grad(results, wanted, rounded, allow_unused=True))
        return [y.detach() for y in results], [
            next(grads) if x is not None and x.requires_grad else None for x in leaves
        ]

    def check(self, function: Callable[..., Any] | None = None) -> None:
        """Native's error is at most twice that of the reference in the same type; NaN and inf are where they should."""
        ours = self.run(function or getattr(native, self.name))
        plain = self.run(getattr(reference, self.name))
        exact = self.run(getattr(reference, self.name), torch.float64)
        terms = iter([*self.terms, *[0.0] * 9])
        for kind in (0, 1):
            for found, rough, fine in zip(ours[kind], plain[kind], exact[kind], strict=True):
                size = next(terms)
                assert (found is None) == (fine is None)
                if found is not None and rough is not None and fine is not None:
                    assert found.dtype == rough.dtype
                    same_or_better(found.cpu(), rough.cpu(), fine.cpu(), size)


def weights(y: Tensor) -> Tensor:
    """What a result is multiplied by, before the sum whose gradients are taken: the same for any type of y."""
    generator = torch.Generator().manual_seed(y.numel())
    return torch.randn(y.shape, generator=generator).to(y.device)


def numbers(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def tables(
    seq: int, rotary_dim: int, batch: int | None = None, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """cos and sin for `rotary`, of angles that differ in the two halves: not what real tables are, but more general."""
    shape = (seq, rotary_dim) if batch is None else (batch, 1, seq, rotary_dim)
    angles = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device) * 6
    return {"cos": angles.cos(), "sin": (angles * 1.3).sin()}


def documents(batch: int, queries: int, keys: int, device: str = "cpu", seed: int = 0) -> Documents:
    """Documents whose tokens need not be neighbours, the queries being the last tokens."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 3, (batch, max(queries, keys)), generator=generator).int().to(device)
    return Documents(*(numbers[:, numbers.size(1) - n :].contiguous() for n in (queries, keys)))


def norm_terms(x: Tensor, residual: Tensor | None, results: int) -> list[float]:
    """`Case.terms` of a norm: x - mean times the reciprocal deviation, and sums over rows."""
    if not x.numel():
        return []
    total = (x.double() if residual is None else x.double() + residual.double()).nan_to_num(0, 0, 0)
    steep = (total.var(-1, unbiased=False) + 1e-5).rsqrt().max().item()
    rows = 10 * (x.numel() / x.size(-1)) ** 0.5
    inputs = [10 * steep] * (1 if residual is None else 2)
    return [steep * total.abs().max().item(), *[0.0] * (results - 1), *inputs, rows, rows]
