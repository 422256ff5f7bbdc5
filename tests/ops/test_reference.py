"""The definitions: against formulas written out in float64, and torch's own where it has them."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import Documents, ProbabilityDropout, reference
from megatron_lite.ops.philox import dropout_factor, philox

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    # A mean far from zero; in fp16 the squares would overflow.
    x, weight, bias = (
        (values(3, 5, 64) * 100 + 300).to(dtype),
        values(64, seed=1).to(dtype),
        values(64, seed=2).to(dtype),
    )
    x64, w64, b64 = x.double(), weight.double(), bias.double()
    centered = x64 - x64.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    tolerance = 20 * DTYPES[dtype]  # the difference of large numbers
    found = reference.layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(found.double(), normed * w64 + b64, rtol=tolerance, atol=tolerance)
    found = reference.layer_norm(x, weight, None, 1e-5)
    torch.testing.assert_close(found.double(), normed * w64, rtol=tolerance, atol=tolerance)
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w64
    assert_near(reference.rms_norm(x, weight, 1e-5), expected, dtype)


def test_the_epsilon_counts() -> None:
    x, ones = torch.full((1, 4), 1e-3), torch.ones(4)
    assert reference.rms_norm(x, ones, 1e-6)[0, 0].item() == pytest.approx(1 / math.sqrt(2), rel=1e-5)
    assert reference.rms_norm(torch.zeros(1, 4), ones, 1e-6).tolist() == [[0, 0, 0, 0]]


def test_activations() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(reference.gelu(x), 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    torch.testing.assert_close(reference.gelu_tanh(x), 0.5 * x * (1 + tanh))
    both = values(3, 10)
    gate, up = both[:, :5], both[:, 5:]
    torch.testing.assert_close(reference.swiglu(both), gate / (1 + (-gate).exp()) * up)


def rotary_tables(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dim", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype: torch.dtype, dim: int) -> None:
    """Each pair (i, i + dim/2) turned by its angle; the features beyond `dim` pass."""
    x = values(2, 3, 5, 8).to(dtype)
    cos, sin = rotary_tables(torch.arange(5), dim)
    expected = x.double().clone()
    for s in range(5):
        for i in range(dim // 2):
            angle = s * 10000.0 ** (-2 * i / dim)
            a, b = x[:, :, s, i].double(), x[:, :, s, i + dim // 2].double()
            expected[:, :, s, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[:, :, s, i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    q, k = reference.rotary(x, x[:, :1], cos.float(), sin.float())
    assert_near(q, expected, dtype)
    assert_near(k, expected[:, :1], dtype)


def test_rotary_by_given_positions() -> None:
    x = values(2, 3, 5, 8).float()
    cos, sin = (table.float() for table in rotary_tables(torch.arange(20), 8))
    positions = torch.tensor([[0, 1, 0, 1, 2], [7, 3, 3, 19, 0]])
    found, _ = reference.rotary(x, x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
    for b in range(2):
        for s in range(5):
            at = positions[b, s]
            one = x[b : b + 1, :, s : s + 1]
            alone, _ = reference.rotary(one, one, cos[at : at + 1], sin[at : at + 1])
            torch.testing.assert_close(found[b, :, s], alone[0, :, 0])


def test_rotary_makes_scores_depend_on_distance() -> None:
    q, k = values(1, 1, 1, 8), values(1, 1, 1, 8, seed=1)

    def score(at: int, other: int) -> float:
        tables = [[t.float() for t in rotary_tables(torch.tensor([p]), 8)] for p in (at, other)]
        a, b = (reference.rotary(x.float(), x.float(), *t)[0] for x, t in zip((q, k), tables, strict=True))
        return (a * b).sum().item()

    assert score(3, 1) == pytest.approx(score(12, 10), rel=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-2)


def defined_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, drop: Tensor | None = None) -> Tensor:
    """One query at a time, in float64. allowed: [b, 1 or heads, s, t]."""
    b, heads, s, d = q.shape
    allowed = allowed.expand(b, heads, s, k.size(2))
    out = torch.zeros(b, heads, s, d, dtype=torch.float64)
    for i in range(b):
        for h in range(heads):
            group = h * k.size(1) // heads
            for at in range(s):
                seen = allowed[i, h, at].nonzero().flatten()
                scores = k[i, group, seen].double() @ q[i, h, at].double() / math.sqrt(d)
                probabilities = scores.softmax(0)
                if drop is not None:
                    probabilities = probabilities * drop[i, h, at, seen].double()
                out[i, h, at] = probabilities @ v[i, group, seen].double()
    return out


def causal(s: int, t: int) -> Tensor:
    """The last query sees every key."""
    return torch.tensor([[key <= query + t - s for key in range(t)] for query in range(s)]).view(1, 1, s, t)


def documents(segments: list[list[int]]) -> tuple[Documents, Tensor]:
    numbers = torch.tensor(segments).int()
    same = numbers[:, :, None] == numbers[:, None, :]
    return Documents(numbers, numbers), (same & causal(numbers.size(1), numbers.size(1))[0]).unsqueeze(1)


SHAPES = [(4, 4, 6, 6), (4, 2, 6, 6), (4, 1, 6, 6), (4, 2, 1, 6), (4, 4, 2, 6), (6, 3, 1, 1)]


def tensors(heads: int, groups: int, s: int, t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        values(2, heads, s, 8).to(dtype),
        values(2, groups, t, 8, seed=1).to(dtype),
        values(2, groups, t, 8, seed=2).to(dtype),
    )


@pytest.mark.parametrize(("heads", "groups", "s", "t"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention(dtype: torch.dtype, heads: int, groups: int, s: int, t: int) -> None:
    q, k, v = tensors(heads, groups, s, t, dtype)
    assert_near(reference.attention(q, k, v), defined_attention(q, k, v, causal(s, t)), dtype)


def test_masked_attention() -> None:
    q, k, v = tensors(4, 2, 6, 6, torch.float32)
    given, mask = documents([[0, 0, 1, 1, 0, 2], [0, 0, 0, 0, -1, -1]])
    found = reference.attention(q, k, v, documents=given)
    assert_near(found, defined_attention(q, k, v, mask), torch.float32)


def test_a_query_that_sees_no_key() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(4, 2, 3, 6, torch.float32))
    queries, keys = torch.tensor([[0, 9, 1]] * 2).int(), torch.tensor([[0, 0, 0, 1, 1, 1]] * 2).int()
    found = reference.attention(q, k, v, documents=Documents(queries, keys))
    assert not found[:, :, 1].any() and found[:, :, 2].abs().min() > 0
    found.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


def test_dropped_probabilities() -> None:
    q, k, v = tensors(4, 2, 6, 6, torch.float32)
    dropout = ProbabilityDropout(0.3, 5)
    drop = dropout_factor(torch.zeros(1, dtype=torch.int64), 2 * 4 * 6 * 6, 0.3, 5).view(2, 4, 6, 6)
    expected = defined_attention(q, k, v, causal(6, 6), drop)
    assert_near(reference.attention(q, k, v, dropout=dropout), expected, torch.float32)
    mine = ProbabilityDropout(0.3, 5, first_head=2, heads=4)
    half = reference.attention(q[:, 2:], k[:, 1:], v[:, 1:], dropout=mine)
    assert_near(half, expected[:, 2:], torch.float32)


def test_softmax_is_taken_in_fp32() -> None:
    """Scores whose exponentials overflow half precision, and differ by less than it can tell apart."""
    q = torch.full((1, 1, 1, 8), 10.0, dtype=torch.float16)
    k = torch.stack([torch.full((8,), 10.0), torch.full((8,), 9.0)]).half().view(1, 1, 2, 8)
    v = torch.eye(2, 8, dtype=torch.float16).view(1, 1, 2, 8)
    found = reference.attention(q, k, v)
    assert found.isfinite().all()
    assert_near(found, defined_attention(q, k, v, causal(1, 2)), torch.float16)


def test_expand_groups() -> None:
    x = values(1, 2, 3, 4)
    wide = reference.expand_groups(x, 6)
    assert all(torch.equal(wide[:, h], x[:, h // 3]) for h in range(6))
    assert reference.expand_groups(x, 2) is x


def test_gradients_of_attention() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(4, 2, 3, 3, torch.float64))
    given, mask = documents([[0, 0, 1], [0, 1, 1]])
    dropout = ProbabilityDropout(0.5, 3)
    drop = reference.probability_factor(torch.zeros(2, 4, 3, 3, dtype=torch.float64), dropout)

    def attend(*qkv: Tensor) -> Tensor:
        # In float64 all the way: the definition's fp32 softmax is too coarse for finite differences.
        k_, v_ = (reference.expand_groups(x, 4) for x in qkv[1:])
        p = (qkv[0] @ k_.mT / math.sqrt(8)).masked_fill(~mask, -torch.inf).softmax(-1) * drop
        return p @ v_

    attend(q, k, v).sum().backward()
    exact = [t.grad.clone() for t in (q, k, v) if t.grad is not None]
    low = [t.detach().float().requires_grad_() for t in (q, k, v)]
    reference.attention(*low, documents=given, dropout=dropout).sum().backward()
    for found, expected in zip(low, exact, strict=True):
        assert found.grad is not None and found.grad.isfinite().all()
        torch.testing.assert_close(found.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_gelu_is_torchs() -> None:
    x = values(100).float()
    assert torch.equal(reference.gelu(x), F.gelu(x))


def test_the_sum_of_a_residual_and_its_norm() -> None:
    x, residual, weight, bias = values(3, 8), values(3, 8, seed=1), values(8, seed=2), values(8, seed=3)
    y, total = reference.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, reference.layer_norm(x + residual, weight, bias, 1e-5))
    y, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, reference.rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("activation", [reference.gelu, reference.gelu_tanh, reference.swiglu])
def test_activations_add_a_bias(activation: Callable[..., Tensor]) -> None:
    x, bias = values(3, 8), values(8, seed=1)
    assert torch.equal(activation(x, bias), activation(x + bias))
    assert not torch.equal(activation(x, bias), activation(x))


def test_philox_draws_the_published_numbers() -> None:
    """A known answer of Random123, the authors' library: counter and key of all zeros."""
    words = [int(word) for word in philox(torch.zeros((), dtype=torch.int64), 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_is_a_function_of_seed_and_global_index() -> None:
    x = torch.ones(6, 10)
    whole = reference.dropout(x, 0.25, 7)
    assert torch.equal(whole[2:4], reference.dropout(x[2:4], 0.25, 7, offset=20))
    part = reference.dropout(x[:, 4:7], 0.25, 7, offset=4, row_stride=10)
    assert torch.equal(whole[:, 4:7], part), "columns, at no multiple of four"
    aligned = reference.dropout(torch.ones(6, 12), 0.25, 7)
    assert torch.equal(aligned[:, 4:8], reference.dropout(torch.ones(6, 4), 0.25, 7, offset=4, row_stride=12))
    assert torch.equal(aligned.flatten()[:60], whole.flatten())
    assert not torch.equal(whole, reference.dropout(x, 0.25, 8))
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not reference.dropout(x, 1.0, 7).any() and torch.equal(reference.dropout(x, 0.0, 7), x)
