"""torch's fused attention is the same function as the reference: outputs and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_lite.ops import Documents, reference, sdpa
from megatron_lite.ops.backends import Needs

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
HOPPER = Needs("cuda", torch.bfloat16, (9, 0))


def tensors(heads: int, groups: int, s: int, t: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, s, 8), (2, groups, t, 8), (2, groups, t, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outcomes(attend: object, inputs: list[Tensor], documents: Documents | None) -> list[Tensor]:
    assert callable(attend)
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    y = attend(*mine, documents=documents)
    (y.float() * torch.arange(y.numel()).view_as(y).float().cos()).sum().backward()
    return [y.detach(), *(x.grad for x in mine if x.grad is not None)]


def documents(kind: str, s: int, t: int) -> Documents | None:
    if kind == "causal":
        return None
    keys = torch.stack([torch.arange(t) * 3 // t, torch.arange(t) * 2 // t]).int()
    return Documents(keys[:, t - s :].contiguous(), keys)


@pytest.mark.parametrize("kind", ["causal", "documents"])
@pytest.mark.parametrize(("s", "t"), [(6, 6), (1, 6), (1, 1), (3, 7)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(dtype: torch.dtype, groups: int, s: int, t: int, kind: str) -> None:
    inputs, given = tensors(4, groups, s, t, dtype), documents(kind, s, t)
    found, low = (outcomes(f, inputs, given) for f in (sdpa.attention, reference.attention))
    exact = outcomes(reference.attention, [x.detach().float() for x in inputs], given)
    assert len(found) == 4
    for ours, rough, fine in zip(found, low, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == fine.shape
        # A kernel's error is at most twice that of plain torch in the same precision, and a rounding of the result.
        rounding = torch.finfo(dtype).eps * fine.abs().max() + 1e-6
        allowed = 2 * (rough.float() - fine).abs().max() + rounding
        assert (ours.float() - fine).abs().max() <= allowed


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT, CUDNN])
def test_only_the_kernel_asked_for_is_used(kernel: SDPBackend) -> None:
    """On a CPU there is flash alone; with another one torch refuses, and does not fall back."""
    inputs = tensors(4, 2, 6, 6)
    attend = sdpa.load("attention", kernel)["attention"]
    if kernel == FLASH:
        assert torch.equal(attend(*inputs), sdpa.attention(*inputs))
    else:
        with pytest.raises(RuntimeError, match="No viable backend"):
            attend(*inputs)


@pytest.mark.parametrize(
    ("kernel", "needs", "reason"),
    [
        (None, {"attention_dropout": True}, "the same on every layout"),
        (None, {"documents": "scattered", "capability": None, "device": "cpu"}, None),
        (FLASH, {}, None),
        (FLASH, {"capability": None, "device": "cpu"}, "it needs an NVIDIA GPU"),
        (FLASH, {"capability": (7, 5)}, "a GPU of capability 8.0, not 7.5"),
        (FLASH, {"dtype": torch.float32}, "it takes bf16 and fp16, not fp32"),
        (FLASH, {"documents": "runs"}, "a mask of queries x keys"),
        (CUDNN, {"documents": "runs"}, "a mask of queries x keys"),
        (CUDNN, {"attention_dropout": True}, "the same on every layout"),
        (EFFICIENT, {"documents": "scattered", "dtype": torch.float32, "capability": (7, 0)}, None),
        (EFFICIENT, {"capability": (4, 0)}, "capability 5.0, not 4.0"),
    ],
)
def test_what_it_says_it_cannot_do(
    kernel: SDPBackend | None, needs: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = list(sdpa.lacks("attention", Needs(**{**vars(HOPPER), **needs}), kernel))  # type: ignore[arg-type]
    assert (said == []) if reason is None else (len(said) == 1 and reason in said[0])


def test_a_gpu_that_is_there_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sdpa, "_probe", lambda kernel, needs: needs.head_dim <= 128)
    assert list(sdpa.lacks("attention", HOPPER, CUDNN)) == []
    (reason,) = sdpa.lacks("attention", Needs("cuda", torch.bfloat16, (9, 0), head_dim=192), CUDNN)
    assert reason == "torch refuses it for head_dim 192 in bf16 on this GPU"
