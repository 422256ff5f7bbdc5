"""The same operations under torch.compile: as operators of torch.library."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron_lite.ops import ProbabilityDropout, native
from tests.ops.native.cases import documents, numbers, tables

F32 = torch.float32
operators = torch.ops.megatron_lite


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, by its name and a remark."""

    def new(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
        return numbers(*shape, dtype=F32, seed=seed).requires_grad_(grad)

    def no(*shape: int, seed: int = 0) -> Tensor:
        return new(*shape, seed=seed, grad=False)

    x, y, w, b, rows = new(3, 8), new(3, 8, seed=1), new(8, seed=2), new(8, seed=3), no(3, seed=4).abs()
    q, k, scores = new(2, 4, 5, 8), new(2, 2, 5, 8, seed=1), new(2, 3, 5, 7)
    parts, labels = documents(2, 5, 7), torch.arange(3)
    return {
        "norm": (x, w, b, 1e-5, False),
        "norm, rms": (x, w, None, 1e-5, True),
        "add_norm": (x, y, w, b, 1e-5, False),
        "norm_backward": (no(3, 8), None, no(3, 8, seed=1), no(8), rows, rows, False, True),
        "activation": (x, b, "gelu"),
        "activation, alone": (x, None, "swiglu"),
        "activation_backward": (no(3, 4), no(3, 8), None, "swiglu", False),
        "dropout": (x, 0.3, 2**63 - 1, 3, 20),
        "rotary": (q, k, *tables(5, 6).values(), False),
        "softmax": (scores, 0.5, True, parts.queries, parts.keys, torch.ones(5, 7).bool().expand(2, 3, 5, 7)),
        "softmax_backward": (no(3, 8), no(3, 8, seed=1), 0.5),
        "attention": (q, k, k, parts.queries, parts.queries, 0.3, 0.2, 7, 0, 4),
        "attention_backward": (
            *(no(2, 4, 5, 8), no(2, 4, 5, 8), no(2, 2, 5, 8), no(2, 2, 5, 8)),
            *(no(2, 4, 5, 8), no(2, 4, 5), None, None, 0.3, 0.0, 0, 0, 4, False),
        ),
        "cross_entropy_stats": (no(3, 8), labels, 1, 7),
        "cross_entropy_grad": (no(3, 8), labels, rows, rows, rows, 1, 7, 0.1),
    }


@pytest.mark.parametrize("sample", samples())
def test_opcheck(sample: str) -> None:
    name = sample.partition(",")[0]
    opcheck(getattr(operators, name).default, samples()[sample])


TABLES = tuple(tables(5, 8).values())


def everything(
    x: Tensor, residual: Tensor, w: Tensor, b: Tensor, q: Tensor, k: Tensor, scores: Tensor, seed: int
) -> tuple[Tensor, ...]:
    """Every operation once; of these results the last is not differentiable."""
    y, total = native.add_layer_norm(x, residual, w, b, 1e-5)
    y = native.layer_norm(y, w, None, 1e-5) + native.rms_norm(total, w, 1e-5)
    y, total = native.add_rms_norm(y, total, w, 1e-5)
    y = native.gelu(y, b) + native.gelu_tanh(y) + total
    y = native.dropout(native.swiglu(torch.cat((y, total), -1)), 0.3, seed)
    turned = native.rotary(q.transpose(1, 2), k.transpose(1, 2), *TABLES)
    attended = native.attention(*turned, k.transpose(1, 2), dropout=ProbabilityDropout(0.2, seed))
    logits, labels = y.detach().flatten(0, 1) * 2, torch.zeros(6, dtype=torch.int64)
    stats = native.cross_entropy_stats(logits, labels, 0, 7)
    gradient = native.cross_entropy_grad(logits, labels, *stats[:2], torch.ones_like(stats[0]), 0, 7, 0.1)
    return y, *turned, attended, native.softmax(scores, scale=0.5), gradient


def outcome(function: Any, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Results of `everything` and gradients of its inputs."""
    shapes = ((2, 3, 8), (2, 3, 8), (8,), (8,), (2, 5, 4, 8), (2, 5, 2, 8), (2, 3, 5, 7))
    inputs = [numbers(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    *found, gradient = function(*inputs, seed)
    assert not gradient.requires_grad
    loss = sum((y.float().sin().sum() for y in found), torch.zeros(()))
    return [*found, gradient, *torch.autograd.grad(loss, inputs)]


def check(backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    # The second seed makes it a variable of the compiled code; there is no third compilation.
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed in (5, 6, 2**63 - 7):
            ours, theirs = (outcome(function, dtype, seed) for function in (compiled, everything))
            for a, b in zip(ours, theirs, strict=True):
                assert a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_traced(dtype: torch.dtype) -> None:
    """One graph, of the same values and gradients as eager mode, to the bit."""
    check("aot_eager", dtype)


@pytest.mark.slow
def test_compiled() -> None:
    check("inductor", F32)
