"""Parallel layers against the plain ones: outputs, and the gradients of inputs and parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.parallel.layers import (
    Build,
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    replicated,
    vocab_parallel_logits,
)
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.parameter import spec_of
from tests.distributed import run_ranks

B, S, H, FFN, VOCAB = 2, 8, 12, 16, 24
RANKS = 4


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Both(nn.Module):
    """Column then row, as in attention and MLP; `gated` with two projections in one."""

    def __init__(self, build: Build, gated: bool, bias: bool) -> None:
        super().__init__()
        out = (2, FFN) if gated else (FFN,)
        self.mesh, self.gated = build.mesh, gated
        self.column = ColumnParallelLinear("column", H, out, build, bias=bias, std=0.5)
        self.row = RowParallelLinear("row", FFN, H, build, bias=bias, std=0.5)
        self.scale = build.parameter("scale", (H,), fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.column(x * replicated(self.scale, self.mesh))
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = gate.sigmoid() * up
        return self.row(y.tanh())


def build(tensor: int, sequence: bool) -> Build:
    mesh = build_mesh(tensor, 1, sequence) if tensor > 1 else Mesh()
    return Build(mesh, 3, torch.float64, torch.device("cpu"))


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Another way to compute linear layers, which shows in the result."""
    return 2 * (x @ weight.t()) + (0 if bias is None else 2 * bias)


def through_both(
    tensor: int, sequence: bool, gated: bool, bias: bool, linear: Callable[..., Tensor] = F.linear
) -> tuple[Tensor, Tensor, Any]:
    b = replace(build(tensor, sequence), linear=linear)
    module = Both(b, gated, bias)
    for number, p in enumerate(p for name, p in sorted(module.named_parameters()) if name.endswith("bias")):
        spec = spec_of(p)
        whole = values(20 + number, *spec.global_shape)
        p.data.copy_(
            whole if spec.dim is None else whole.narrow(spec.dim, spec.start, spec.stop - spec.start)
        )
    x, g = values(1, B, S, H), values(2, B, S, H)
    if b.mesh.sequence_parallel:
        x, g = (t.chunk(tensor, 1)[b.mesh.tensor_rank] for t in (x, g))
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(g)
    assert x.grad is not None
    grads = {name: (spec_of(p).dim, p.grad) for name, p in module.named_parameters()}
    return y.detach(), x.grad, grads


@pytest.mark.parametrize(
    ("gated", "bias", "linear"),
    [*((gated, bias, F.linear) for gated in (False, True) for bias in (True, False)), (True, False, doubled)],
)
@pytest.mark.parametrize("sequence", [False, True])
def test_column_and_row(sequence: bool, gated: bool, bias: bool, linear: Callable[..., Tensor]) -> None:
    y, x_grad, grads = through_both(1, False, gated, bias, linear)
    found = run_ranks(RANKS, through_both, RANKS, sequence, gated, bias, linear)
    for index, expected in ((0, y), (1, x_grad)):
        for rank, part in enumerate(found):
            torch.testing.assert_close(part[index], expected.chunk(RANKS, 1)[rank] if sequence else expected)
    for name, (_, expected) in grads.items():
        dim = found[0][2][name][0]
        for rank, (_, _, theirs) in enumerate(found):
            part = expected if dim is None else expected.chunk(RANKS, dim)[rank]
            torch.testing.assert_close(theirs[name][1], part, msg=lambda m, n=name: f"{n}: {m}")


def test_one_rank_is_the_plain_layer() -> None:
    module = Both(build(1, False), False, True)
    x = values(1, B, S, H)
    plain = F.linear(
        F.linear(x, module.column.weight, module.column.bias).tanh(), module.row.weight, module.row.bias
    )
    assert torch.equal(module(x), plain)


def test_one_rank_computes_with_the_linear_it_is_built_with() -> None:
    module = Both(replace(build(1, False), linear=doubled), False, True)
    x = values(1, B, S, H)
    inner = doubled(x, module.column.weight, module.column.bias).tanh()
    assert torch.equal(module(x), doubled(inner, module.row.weight, module.row.bias))


def through_vocabulary(tensor: int, sequence: bool) -> tuple[Tensor, Tensor, Tensor]:
    b = build(tensor, sequence)
    embed = VocabParallelEmbedding("embed", VOCAB, H, b, std=1.0)
    tokens = torch.arange(B * S).view(B, S) * 5 % VOCAB
    hidden = embed(tokens)
    inner = hidden.tanh()
    if b.mesh.sequence_parallel:
        inner = inner.detach().requires_grad_()
    logits = vocab_parallel_logits(inner, embed.weight, b.mesh)
    logits.backward(values(2, B, S, VOCAB).chunk(tensor, -1)[b.mesh.tensor_rank])
    assert embed.weight.grad is not None
    return hidden.detach(), logits.detach(), embed.weight.grad if not sequence else inner.grad  # type: ignore[return-value]


@pytest.mark.parametrize("tensor", [2, RANKS])
def test_embedding_and_tied_logits(tensor: int) -> None:
    hidden, logits, grad = through_vocabulary(1, False)
    for rank, found in enumerate(run_ranks(tensor, through_vocabulary, tensor, False)):
        torch.testing.assert_close(found[0], hidden)
        torch.testing.assert_close(found[1], logits.chunk(tensor, -1)[rank])
        torch.testing.assert_close(found[2], grad.chunk(tensor, 0)[rank])


def test_logits_of_a_divided_sequence() -> None:
    hidden, logits, _ = through_vocabulary(1, False)
    weight = VocabParallelEmbedding("embed", VOCAB, H, build(1, False), std=1.0).weight
    inner_grad = values(2, B, S, VOCAB) @ weight
    for rank, found in enumerate(run_ranks(RANKS, through_vocabulary, RANKS, True)):
        torch.testing.assert_close(found[0], hidden.chunk(RANKS, 1)[rank])
        torch.testing.assert_close(found[1], logits.chunk(RANKS, -1)[rank])
        torch.testing.assert_close(found[2], inner_grad.detach().chunk(RANKS, 1)[rank])


def collected_shapes(make: Callable[[Build], nn.Module]) -> dict[str, tuple[int, ...]]:
    b = Build(Mesh(rank=1, tensor_size=2), 3, torch.float32, torch.device("meta"))
    return {name: tuple(p.shape) for name, p in make(b).named_parameters()}


def test_shapes_of_a_shard() -> None:
    assert collected_shapes(lambda b: Both(b, True, True)) == {
        "column.weight": (2, FFN // 2, H),
        "column.bias": (2, FFN // 2),
        "row.weight": (H, FFN // 2),
        "row.bias": (H,),
        "scale": (H,),
    }


def kept_for_backward(sequence: bool) -> list[tuple[int, ...]]:
    b = build(2, sequence)
    layer = ColumnParallelLinear("column", H, (FFN,), b, bias=True, std=0.5)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        layer(torch.ones(B, S // 2 if sequence else S, H, dtype=torch.float64))
    return shapes


@pytest.mark.parametrize("sequence", [False, True])
def test_the_gathered_input_is_not_kept(sequence: bool) -> None:
    for shapes in run_ranks(2, kept_for_backward, sequence):
        assert sorted(shapes) == sorted([(B, S // 2 if sequence else S, H), (FFN // 2, H)])
