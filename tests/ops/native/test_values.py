"""Every operation against float64, on shapes, types and layouts of all kinds; forward and backward."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.ops import ProbabilityDropout, native, reference
from tests.csrc.emulation import same_or_better
from tests.ops.native.cases import DEVICES, DTYPES, Case, documents, norm_terms, numbers, tables

few = settings(max_examples=30, deadline=None)
devices = pytest.mark.parametrize("device", DEVICES)
LEADING = st.sampled_from([(), (1,), (7,), (0,), (3, 0), (2, 5), (2, 1, 3), (40, 3)])
COLS = st.one_of(st.integers(1, 80), st.sampled_from([128, 384, 1281]))
NORMS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
ACTIVATIONS = ["gelu", "gelu_tanh", "swiglu"]


def dtype_for(device: str, name: str = "") -> Any:
    return st.sampled_from([dtype for dtype in DTYPES[device] if not native.serves(device, dtype, name)])


def norm_case(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool, spoil: Any
) -> Case:
    x = numbers(*shape, dtype=dtype, device=device)
    if spoil is not None:
        x.view(-1)[x.numel() // 2] = spoil
    residual = numbers(*shape, dtype=dtype, device=device, seed=1) if name.startswith("add") else None
    vectors: list[Any] = [numbers(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (2, 3)]
    if name.endswith("rms_norm"):
        vectors.pop()
    elif not bias:
        vectors[-1] = None
    inputs = [x, *([] if residual is None else [residual]), *vectors]
    return Case(name, inputs, {"eps": 1e-5}, norm_terms(x, residual, 1 if residual is None else 2))


@devices
@few
@given(data=st.data(), name=st.sampled_from(NORMS), leading=LEADING, cols=COLS, bias=st.booleans())
def test_norms(device: str, data: Any, name: str, leading: tuple[int, ...], cols: int, bias: bool) -> None:
    dtype = data.draw(dtype_for(device))
    norm_case(name, (*leading, cols), dtype, device, bias, None).check()


@devices
@few
@given(data=st.data(), name=st.sampled_from(ACTIVATIONS), leading=LEADING, cols=COLS, bias=st.booleans())
def test_activations(
    device: str, data: Any, name: str, leading: tuple[int, ...], cols: int, bias: bool
) -> None:
    dtype = data.draw(dtype_for(device))
    features = cols * (2 if name == "swiglu" else 1)
    x = numbers(*leading, features, dtype=dtype, device=device)
    shift = numbers(features, dtype=dtype, device=device, seed=1) if bias else None
    # Slopes cancel to small numbers; the bias' gradient is a sum over the rows.
    Case(name, [x, shift], {}, [1.0, 4.0, 10 * max(math.prod(leading), 1) ** 0.5]).check()


@devices
@few
@given(
    data=st.data(),
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 4), st.integers(0, 7)),
    head_dim=st.sampled_from([2, 6, 16, 64]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    per_row=st.booleans(),
)
def test_rotary(
    device: str, data: Any, sizes: tuple[int, int, int, int], head_dim: int, share: float, per_row: bool
) -> None:
    (b, h, g, s), dtype = sizes, data.draw(dtype_for(device))
    q = numbers(b, h, s, head_dim, dtype=dtype, device=device)
    k = numbers(b, g, s, head_dim, dtype=dtype, device=device, seed=1)
    given = tables(s, int(head_dim * share) // 2 * 2, b if per_row else None, device)
    Case("rotary", [q, k], given, [1.0] * 4).check()


@devices
@few
@given(
    data=st.data(),
    sizes=st.tuples(
        st.integers(0, 2), st.integers(1, 3), st.integers(0, 9), st.one_of(st.integers(0, 40), COLS)
    ),
    causal=st.booleans(),
    split=st.booleans(),
    mask=st.sampled_from([None, (1, 1), (2, 1), (1, 3)]),
)
def test_softmax(
    device: str,
    data: Any,
    sizes: tuple[int, int, int, int],
    causal: bool,
    split: bool,
    mask: tuple[int, int] | None,
) -> None:
    (b, h, s, t), dtype = sizes, data.draw(dtype_for(device))
    given: dict[str, Any] = {"scale": 0.6, "causal": causal}
    if split:
        given["documents"] = documents(b, s, t, device)
    if mask is not None and mask[0] in (1, b) and mask[1] in (1, h):
        seen = torch.rand((*mask, s, t), generator=torch.Generator().manual_seed(0)) < 0.6
        given["mask"] = seen.to(device)
    x = numbers(b, h, s, t, dtype=dtype, device=device)
    Case("softmax", [x], given, [0.0, 1.0]).check()


def attention_case(
    sizes: tuple[int, int, int, int, int], head_dim: int, dtype: torch.dtype, device: str, **given: Any
) -> Case:
    """`sizes`: batch, groups, heads a group, queries, keys."""
    b, g, share, s, t = sizes
    q = numbers(b, g * share, s, head_dim, dtype=dtype, device=device)
    k, v = (numbers(b, g, t, head_dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    # Scores are sums over the features, and the gradients of q and k differences of such.
    fp32 = dtype == torch.float32
    return Case("attention", [q, k, v], given, [8.0 if fp32 else 1.0, *[100.0 if fp32 else 10.0] * 3])


@devices
@few
@given(
    data=st.data(),
    sizes=st.tuples(
        st.integers(0, 2),
        st.integers(1, 3),
        st.integers(1, 3),
        st.one_of(st.integers(0, 9), st.just(70)),
        st.one_of(st.integers(0, 9), st.just(131)),
    ),
    head_dim=st.sampled_from([2, 8, 20, 64, 128, 256]),
    split=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    first=st.integers(0, 2),
)
def test_attention(
    device: str,
    data: Any,
    sizes: tuple[int, int, int, int, int],
    head_dim: int,
    split: bool,
    p: float,
    first: int,
) -> None:
    dtype, given = data.draw(dtype_for(device, "attention")), {}
    if split:
        given["documents"] = documents(sizes[0], *sizes[3:], device)
    if p:
        given["dropout"] = ProbabilityDropout(p, 2**64 - 5, first, 12)
    attention_case(sizes, head_dim, dtype, device, **given).check()


@devices
def test_slices_of_the_heads_drop_what_all_of_them_drop(device: str) -> None:
    case = attention_case((2, 4, 2, 6, 6), 8, DTYPES[device][1], device, dropout=ProbabilityDropout(0.4, 7))
    whole = native.attention(*case.inputs, **case.given)
    for rank in range(2):
        q, k, v = (x.chunk(2, 1)[rank] for x in case.inputs if x is not None)
        part = native.attention(q, k, v, dropout=ProbabilityDropout(0.4, 7, 4 * rank, 8))
        assert torch.equal(part, whole.chunk(2, 1)[rank])


@devices
@few
@given(
    data=st.data(),
    shape=st.sampled_from([(5, 3), (1, 1), (0, 4), (4, 0), (3, 5, 7), (2, 600), (6,)]),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    offset=st.sampled_from([0, 3, 2**34 - 5]),
    row_stride=st.sampled_from([None, 4, 601]),
)
def test_dropout_is_the_reference_to_the_bit(
    device: str, data: Any, shape: tuple[int, ...], **given: Any
) -> None:
    case = Case("dropout", [numbers(*shape, dtype=data.draw(dtype_for(device)), device=device)], given)
    for ours, theirs in zip(case.run(native.dropout), case.run(reference.dropout), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_slices_drop_what_the_whole_drops() -> None:
    x = numbers(4, 6, 10, dtype=torch.float32)
    whole = native.dropout(x, 0.4, 5)
    halves = [
        native.dropout(part, 0.4, 5, offset=rank * 30, row_stride=60)
        for rank, part in enumerate(x.chunk(2, 1))
    ]
    assert torch.equal(torch.cat(halves, 1), whole)
    assert 0.2 < (whole == 0).float().mean() < 0.6


@devices
@few
@given(
    data=st.data(),
    n=st.integers(0, 9),
    cols=st.one_of(st.integers(1, 60), st.just(4100)),
    share=st.floats(0, 1),
    start=st.sampled_from([0, 30]),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_cross_entropy(
    device: str, data: Any, n: int, cols: int, share: float, start: int, z_loss: float
) -> None:
    """Both halves, for a slice of a vocabulary that `start` others lie before."""
    dtype, valid = data.draw(dtype_for(device)), int(share * cols)
    logits = 4 * numbers(n, cols, dtype=dtype, device=device)
    labels = torch.randint(0, start + cols, (n,), generator=torch.Generator().manual_seed(0)).to(device)
    ours = native.cross_entropy_stats(logits, labels, start, valid)
    exact = reference.cross_entropy_stats(logits.double(), labels, start, valid)
    for found, fine in zip(ours, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), fine.double(), rtol=1e-5, atol=0)
    largest = 8 + numbers(n, dtype=torch.float32, device=device, seed=1).abs()
    total = 1 + numbers(n, dtype=torch.float32, device=device, seed=2).abs()
    grad = numbers(n, dtype=torch.float32, device=device, seed=3)

    def gradient(function: Any, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        stats = (x.to(wide) for x in (largest, total, grad))
        return function(logits.to(dtype, copy=True), labels, *stats, start, valid, z_loss).cpu()

    plain, fine = (gradient(reference.cross_entropy_grad, type_) for type_ in (dtype, torch.float64))
    same_or_better(gradient(native.cross_entropy_grad, dtype), plain, fine, 1.0)


def test_the_gradient_overwrites_the_logits() -> None:
    logits, labels, ones = (
        numbers(3, 8, dtype=torch.float32),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3),
    )
    before, version = logits.clone(), logits._version
    found = native.cross_entropy_grad(logits, labels, ones, ones, ones, 0, 8, 0.0)
    assert found.data_ptr() == logits.data_ptr() and not torch.equal(logits, before)
    assert logits._version > version  # an operation that saved them would notice
    apart = numbers(8, 3, dtype=torch.float32).t()
    kept = apart.clone()
    assert not torch.equal(native.cross_entropy_grad(apart, labels, ones, ones, ones, 0, 8, 0.0), kept)
    assert torch.equal(apart, kept)


@devices
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
def test_bad_numbers_pass(device: str, spoil: float) -> None:
    for dtype in DTYPES[device]:
        for name in NORMS:
            norm_case(name, (3, 40), dtype, device, True, spoil).check()
        x = numbers(1, 2, 3, 40, dtype=dtype, device=device)
        x[0, 1, 2, 5] = spoil
        # Softmax's gradient is compared where its result is finite; the reference's is NaN elsewhere, too.
        Case("softmax", [x], {"scale": 0.5}, [0.0, 1.0]).check()
        Case("rotary", [x, x], tables(3, 40, device=device), [1.0] * 4).check()
        if spoil > -math.inf:  # of which GELU is -0 by one formula and NaN by another
            for name in ACTIVATIONS:
                Case(name, [x.view(6, 40), None], {}, [1.0, 4.0]).check()
        assert torch.equal(
            native.dropout(x, 0.5, 1).nan_to_num(1, 2, 3), reference.dropout(x, 0.5, 1).nan_to_num(1, 2, 3)
        )


def cut(x: Tensor, way: str) -> Tensor:
    """The same numbers in another layout."""
    if way == "every second":
        return torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]
    if way == "odd address":
        return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@devices
@pytest.mark.parametrize("way", ["every second", "odd address", "transposed"])
def test_layouts_do_not_matter(device: str, way: str) -> None:
    """Results and gradients are the same to the bit from inputs and gradients that are not contiguous."""
    for dtype in DTYPES[device]:
        scores = numbers(2, 3, 5, 8, dtype=dtype, device=device)
        k = numbers(2, 2, 5, 8, dtype=dtype, device=device, seed=7)
        bias = numbers(8, dtype=dtype, device=device, seed=8)
        cases = [norm_case(name, (3, 5, 8), dtype, device, True, None) for name in NORMS]
        cases += [Case(name, [scores, bias]) for name in ACTIVATIONS]
        cases += [Case("softmax", [scores]), Case("dropout", [scores], {"p": 0.3, "seed": 1})]
        cases += [Case("rotary", [scores, k], tables(5, 4, device=device))]
        if native.serves(device, dtype, "attention") is None:
            cases += [attention_case((2, 2, 3, 5, 7), 8, dtype, device)]
        for case in cases:
            function = getattr(native, case.name)

            def moved(*inputs: Any, function: Any = function, **given: Any) -> Any:
                found = function(*(None if x is None else cut(x, way) for x in inputs), **given)
                found = found if isinstance(found, tuple) else (found,)
                return tuple(cut(y, way) for y in found)

            for ours, theirs in zip(case.run(moved), case.run(function), strict=True):
                assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), case.name


def test_gradients_that_are_expanded() -> None:
    x = numbers(4, 6, dtype=torch.float32).requires_grad_()
    weight = torch.ones(6)
    y = native.layer_norm(x, weight, None, 1e-5)
    (ours,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad(y, x, torch.ones(4, 6))
    assert torch.equal(ours, theirs)
