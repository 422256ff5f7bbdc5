"""The optimizer step of ranks that hold everything, against plain torch."""

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.config import OptimizerConfig
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import create_parameter
from megatron_lite.training.optimizer import WholeAdamW
from tests.distributed import run_ranks
from tests.training_case import Case, import_what_ranks_import, make_engine, train

CONFIG = OptimizerConfig(lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0)


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    shapes = {"a.weight": (5, 7), "b.weight": (3, 4), "b.bias": (3,)}
    return [create_parameter(name, shape, Mesh(), std=1.0, dtype=dtype) for name, shape in shapes.items()]


def plain(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    matrices, vectors = parameters[:2], parameters[2:]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))


def backward(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """A backward pass in which each parameter gets this gradient."""
    torch.autograd.backward([(p * g).sum() for p, g in zip(parameters, gradients, strict=True)])


def drawn(step: int, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(p.shape, generator=generator) * size).to(dtype) for p in weights(dtype)]


@pytest.mark.parametrize("limit", [1.0, 1e6, 0.0], ids=["clipped", "below the limit", "no limit"])
def test_fp32_steps_are_plain_torchs(limit: float) -> None:
    ours, theirs = weights(torch.float32), weights(torch.float32)
    optimizer = WholeAdamW(ours, CONFIG.model_copy(update={"grad_clip": limit}), Mesh())
    reference = plain(theirs)
    for step in range(3):
        for parameters in (ours, theirs):
            backward(parameters, drawn(step, torch.float32))
        norm = nn.utils.clip_grad_norm_(theirs, limit or math.inf)
        optimizer.step()
        reference.step()
        assert optimizer._global_grad_norm == pytest.approx(float(norm), rel=1e-6)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        optimizer.zero_grad()
        reference.zero_grad()


def test_bf16_steps_are_those_of_fp32_masters_and_gradients_add_up_in_fp32() -> None:
    ours = weights(torch.bfloat16)
    optimizer = WholeAdamW(ours, CONFIG, Mesh())
    theirs = [nn.Parameter(w.detach().float()) for w in ours]
    reference = plain(theirs)
    for step in range(3):
        # In bf16 the small ones would vanish beside the first.
        parts = [drawn(step, torch.bfloat16), *[drawn(9 + n, torch.bfloat16, 1e-3) for n in range(3)]]
        for part in parts:
            backward(ours, part)
            assert all(w.grad is None for w in ours), "kept twice"
        for parameter, *gradients in zip(theirs, *parts, strict=True):
            parameter.grad = torch.stack(gradients).float().sum(0)
        for weight, parameter in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                optimizer.get_param_gradient_attribute(weight), parameter.grad, rtol=1e-6, atol=1e-6
            )
        nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        reference.step()
        for weight, parameter in zip(ours, theirs, strict=True):
            torch.testing.assert_close(optimizer.masters[weight], parameter, rtol=1e-6, atol=1e-7)
            assert torch.equal(weight, optimizer.masters[weight].bfloat16())
        optimizer.zero_grad()
        reference.zero_grad()


def test_gradients_add_up_in_bf16_where_that_is_asked_for() -> None:
    ours = weights(torch.bfloat16)
    optimizer = WholeAdamW(ours, CONFIG, Mesh(), accumulate=False)
    parts = [drawn(n, torch.bfloat16) for n in range(2)]
    for part in parts:
        backward(ours, part)
    for weight, first, second in zip(ours, *parts, strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, first + second)
    optimizer.step()
    assert all(torch.equal(w, m.bfloat16()) and m.grad is not None for w, m in optimizer.masters.items())
    assert all(w.grad is None for w in ours)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_leaves_everything(dtype: torch.dtype, bad: float) -> None:
    parameters = weights(dtype)
    optimizer = WholeAdamW(parameters, CONFIG, Mesh())
    before = [p.detach().clone() for p in parameters]
    gradients = drawn(0, dtype)
    gradients[1][0, 0] = bad
    backward(parameters, gradients)
    optimizer.step()
    assert optimizer.overflow and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    backward(parameters, drawn(1, dtype))
    optimizer.step()
    assert not optimizer.overflow
    assert math.isfinite(optimizer._global_grad_norm), "the bad gradient is still there"


def train_without_torchs_compiler(case: Case) -> None:
    sys.modules["torch._dynamo"] = None  # type: ignore[assignment]  # importing it is an error
    train(make_engine(case.config()), range(2))


@pytest.mark.parametrize("case", [Case(), Case(precision="bf16"), Case(pipeline=2)], ids=str)
def test_torchs_compiler_is_not_loaded(case: Case) -> None:
    """torch's optimizers would load it with their first parameters: a second of every start, and 75 MiB."""
    import_what_ranks_import()
    run_ranks(case.world_size, train_without_torchs_compiler, case)
