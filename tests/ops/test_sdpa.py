"""torch's fused attention is the same function as the reference: outputs and gradients."""

import pytest
import torch
from torch import Tensor

from megatron_lite.config import KernelsConfig
from megatron_lite.ops import build_ops, reference, sdpa


def tensors(heads: int, groups: int, s: int, t: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, s, 8), (2, groups, t, 8), (2, groups, t, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outcomes(attend: object, inputs: list[Tensor], **masks: Tensor | None) -> list[Tensor]:
    assert callable(attend)
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    y = attend(*mine, **masks)
    (y.float() * torch.arange(y.numel()).view_as(y).float().cos()).sum().backward()
    return [y.detach(), *(x.grad for x in mine if x.grad is not None)]


def masks(s: int, t: int) -> dict[str, dict[str, Tensor]]:
    triangle = torch.ones(s, t, dtype=torch.bool).tril(t - s)
    segments = torch.arange(t) * 3 // t
    same = (segments[t - s :, None] == segments[None]) & triangle
    drop = (torch.rand(2, 4, s, t, generator=torch.Generator().manual_seed(1)) > 0.3) / 0.7
    return {
        "causal": {},
        "documents": {"mask": same.expand(2, 1, s, t)},
        "dropped": {"dropout_mask": drop},
        "documents, dropped": {"mask": same.expand(2, 1, s, t), "dropout_mask": drop},
    }


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize(("s", "t"), [(6, 6), (1, 6), (1, 1), (3, 7)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(dtype: torch.dtype, groups: int, s: int, t: int, kind: str) -> None:
    inputs = tensors(4, groups, s, t, dtype)
    given = {name: m.to(dtype) if m.is_floating_point() else m for name, m in masks(s, t)[kind].items()}
    found, low = (outcomes(f, inputs, **given) for f in (sdpa.attention, reference.attention))
    exact = outcomes(
        reference.attention,
        [x.detach().float() for x in inputs],
        **{name: m.float() if m.is_floating_point() else m for name, m in given.items()},
    )
    assert len(found) == 4
    for ours, rough, fine in zip(found, low, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == fine.shape
        # A kernel's error is at most twice that of plain torch in the same precision, and a rounding of the result.
        rounding = torch.finfo(dtype).eps * fine.abs().max() + 1e-6
        allowed = 2 * (rough.float() - fine).abs().max() + rounding
        assert (ours.float() - fine).abs().max() <= allowed


def test_build_ops() -> None:
    assert build_ops(KernelsConfig()).attention is sdpa.attention
    assert build_ops(KernelsConfig(attention="reference")).attention is reference.attention
    assert build_ops(KernelsConfig(attention="reference")).chosen == {"attention": "reference"}
    with pytest.raises(ValueError, match="no backend 'flash4'; there are auto, sdpa, reference"):
        build_ops(KernelsConfig.model_construct(attention="flash4"))
