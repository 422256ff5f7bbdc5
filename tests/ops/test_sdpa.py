"""torch's fused attention is the same function as the reference: outputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import KernelsConfig
from megatron_lite.ops import Documents, ProbabilityDropout, build_ops, reference, sdpa


def tensors(heads: int, groups: int, s: int, t: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, s, 8), (2, groups, t, 8), (2, groups, t, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outcomes(attend: Callable[..., Tensor], inputs: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    y = attend(*mine, **given)
    (y.float() * torch.arange(y.numel()).view_as(y).float().cos()).sum().backward()
    return [y.detach(), *(x.grad for x in mine if x.grad is not None)]


def arguments(kind: str, s: int, t: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if "documents" in kind:
        keys = (torch.arange(t) * 3 // t).int().expand(2, t).contiguous()
        given["documents"] = Documents(keys[:, t - s :].contiguous(), keys)
    if "dropped" in kind:
        given["dropout"] = ProbabilityDropout(0.3, 1)
    return given


@pytest.mark.parametrize("kind", ["causal", "documents", "dropped", "documents, dropped"])
@pytest.mark.parametrize(("s", "t"), [(6, 6), (1, 6), (1, 1), (3, 7)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(dtype: torch.dtype, groups: int, s: int, t: int, kind: str) -> None:
    inputs, given = tensors(4, groups, s, t, dtype), arguments(kind, s, t)
    found, low = (outcomes(f, inputs, given) for f in (sdpa.attention, reference.attention))
    exact = outcomes(reference.attention, [x.detach().double() for x in inputs], given)
    assert len(found) == 4
    for ours, rough, fine in zip(found, low, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == fine.shape
        # A kernel's error is at most twice that of plain torch in the same precision, and a rounding of the result.
        rounding = torch.finfo(dtype).eps * fine.abs().max() + 1e-6
        allowed = 2 * (rough.double() - fine).abs().max() + rounding
        assert (ours.double() - fine).abs().max() <= allowed


def test_build_ops() -> None:
    assert build_ops(KernelsConfig()).attention is sdpa.attention
    assert build_ops(KernelsConfig(attention="reference")).attention is reference.attention
    assert build_ops(KernelsConfig(attention="reference")).chosen == {"attention": "reference"}
    with pytest.raises(ValueError, match="no backend 'flash4'; there are auto, sdpa, reference"):
        build_ops(KernelsConfig.model_construct(attention="flash4"))
