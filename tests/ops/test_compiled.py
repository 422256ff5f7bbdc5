"""The reference through torch.compile: traced whole, forward and backward, and still the same functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_lite.ops import Documents, reference, sdpa
from megatron_lite.ops.registry import BACKENDS, GROUPS

# As the default does, but no compiler is started: what is tested is that nothing falls back to eager mode.
TRACED = partial(torch.compile, backend="aot_eager", fullgraph=True)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents(divisor: int) -> Documents:
    numbers = torch.arange(8).div(divisor, rounding_mode="floor").int().expand(2, 8).contiguous()
    return Documents(numbers, numbers)


NORM = (tensor(4, 6, seed=1), tensor(6, seed=2))
SCORES = tensor(2, 4, 8, 8)
HEADS = (tensor(2, 4, 8, 6), tensor(2, 2, 8, 6, seed=1), tensor(2, 2, 8, 6, seed=2))
LABELS = torch.tensor([0, 3, 11])
CASES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "layer_norm": [((NORM[0], NORM[1], NORM[1], 1e-5), {}), ((*NORM, None, 1e-5), {})],
    "rms_norm": [((*NORM, 1e-5), {})],
    "add_layer_norm": [((NORM[0], NORM[0] + 1, NORM[1], None, 1e-5), {})],
    "add_rms_norm": [((NORM[0], NORM[0] + 1, NORM[1], 1e-5), {})],
    "gelu": [((*NORM,), {}), ((NORM[0], None), {})],
    "gelu_tanh": [((*NORM,), {})],
    "swiglu": [((*NORM,), {})],
    "rotary": [((*HEADS[:2], tensor(8, 4, seed=5), tensor(8, 4, seed=6)), {})],
    "softmax": [((SCORES,), {"scale": 0.3}), ((SCORES,), {"documents": documents(3)})],
    "attention": [(HEADS, {}), (HEADS, {"documents": documents(3)}), (HEADS, {"documents": documents(5)})],
    "cross_entropy_stats": [((tensor(3, 16), LABELS, 4, 10), {})],
}


def outcomes(function: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """Outputs, and gradients where there are any."""
    mine = [x.clone() if isinstance(x, Tensor) else x for x in given]
    inputs = [x for x in mine if isinstance(x, Tensor) and x.is_floating_point()]
    for x in inputs:
        x.requires_grad_()
    outputs = function(*mine, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.stack([y.sum() * 1.5 + (y * y).sum() for y in outputs]).sum().backward()
    return [*(y.detach() for y in outputs), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", TRACED)
    (group,) = (group for group, operations in GROUPS.items() if name in operations)
    compiled = BACKENDS["compile"].load(group)[name]
    for given, options in CASES[name]:
        expected = outcomes(getattr(reference, name), given, options)
        for found, right in zip(outcomes(compiled, given, options), expected, strict=True):
            torch.testing.assert_close(found, right)


def test_gradient_of_cross_entropy_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", TRACED)
    functions = BACKENDS["compile"].load("cross_entropy")
    logits, labels = tensor(2000, 16), torch.arange(2000) % 16
    statistics = reference.cross_entropy_stats(logits, labels, 2, 13)[:2]
    rest = (labels, *statistics, tensor(2000, seed=3), 2, 13, 1e-3)
    expected = reference.cross_entropy_grad(logits.clone(), *rest)
    assert functions["cross_entropy_grad"](logits, *rest) is logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kernel", [None, SDPBackend.FLASH_ATTENTION])
def test_sdpa_inside_a_compiled_model(kernel: SDPBackend | None) -> None:
    attend = sdpa.load("attention", kernel)["attention"]
    for found, right in zip(outcomes(TRACED(attend), HEADS, {}), outcomes(attend, HEADS, {}), strict=True):
        torch.testing.assert_close(found, right)


def test_documents_inside_a_compiled_model() -> None:
    """The mask is made once for all layers, outside of the graph: the lock of cached_property cannot be traced."""
    attend, given = sdpa.load("attention")["attention"], {"documents": documents(3)}
    compiled = torch.compile(attend, backend="aot_eager")
    for found, right in zip(outcomes(compiled, HEADS, given), outcomes(attend, HEADS, given), strict=True):
        torch.testing.assert_close(found, right)
