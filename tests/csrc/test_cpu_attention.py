"""The CPU attention, in every build that this machine runs, against float64."""

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.attention_check import (
    Drop,
    Sizes,
    accurate,
    attention,
    draw_segments,
    dropout_factors,
    gap,
    given_strides,
    gradients,
    spaced,
    visible,
)
from tests.csrc.test_cpu import ISAS, LIBRARY, CpuLibrary, _built, _supported

EPS = torch.finfo(torch.float32).eps
DTYPE = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def _torch_takes_one_thread() -> Iterator[None]:
    """For the small products of the references; on a busy machine, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    if request.param not in _supported():
        pytest.skip(f"this machine has no {request.param}")
    return CpuLibrary(request.param)


def workspace(sizes: Sizes) -> Tensor:
    size = _built().mlite_cpu_attention_workspace
    size.argtypes, size.restype = [ctypes.c_int64] * 4, ctypes.c_int64
    batch, heads, _, queries, _, head_dim = sizes
    return torch.full((size(batch, heads, queries, head_dim),), 255, dtype=torch.uint8)


def run(
    library: CpuLibrary,
    tensors: list[Tensor],
    sizes: Sizes,
    *options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp, gradients of q, k, v. tensors: q, k, v, do; options: scale, causal, segments, drop."""
    scale, causal, segments, drop = options
    *qkv, do = tensors
    o = spaced(torch.full_like(qkv[0], 7))
    sums = torch.full(sizes[:2] + sizes[3:4], math.nan)
    problem = [qkv[0].dtype, *sizes, scale, causal, *given_strides(qkv), *(segments or (None, None)), *drop]
    library.call("attention_forward", *problem, *given_strides([o]), sums)
    results = [spaced(torch.full_like(x, 7)) for x in qkv]
    strided = [*given_strides([o]), sums, *given_strides([do]), *given_strides(results)]
    library.call("attention_backward", *problem, *strided, workspace(sizes))
    for x in (o, *results):
        assert gap(x).isnan().all(), "wrote between the rows"
    return o, sums, results


def check(
    library: CpuLibrary,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    causal: bool = True,
    segments: str | None = None,
    drop: Drop | None = None,
    spoil: float | None = None,
    size: float = 1.0,
    scale: float | None = None,
    seed: int = 0,
) -> None:
    """`spoil`: a number put into the last query; `size`: of all others."""
    batch, heads, groups, queries, keys, head_dim = sizes
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, n, length, head_dim) for n, length in ((heads, queries), (groups, keys), (groups, keys))
    ]
    q, k, v, do = ((torch.randn(s, generator=g) * size).to(dtype) for s in (*shapes, shapes[0]))
    if spoil is not None:
        q[0, 0, -1, 0] = spoil
    ids = None if segments is None else draw_segments(sizes, segments, g)
    seen, scale = visible(sizes, causal, ids), head_dim**-0.5 if scale is None else scale
    drop = (0.0, 0, 0, heads) if drop is None else drop
    factors = dropout_factors(sizes, drop)
    given = [spaced(x) for x in (q, k, v, do)]
    o, lse, ours = run(library, given, sizes, scale, causal, ids, drop)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), seen, scale, factors)
    plain, _ = attention(q, k, v, seen, scale, factors)
    size *= max(1.0, factors.max().item()) ** (1 / 3)  # of a product of three
    accurate(o, plain, exact, size)
    exact_lse[exact_lse == math.inf] = math.nan  # of a query whose probabilities are NaN
    torch.testing.assert_close(lse, exact_lse.float(), rtol=2e-6, atol=2e-6, equal_nan=True)
    exact_grads = gradients([q.double(), k.double(), v.double()], do.double(), seen, scale, factors)
    plain_grads = gradients([q, k, v], do, seen, scale, factors)
    if segments is not None or min(queries, keys) < 40:
        # The gradient is taken through the output, as in FlashAttention-2: of few keys, what should cancel leaves the
        # rounding of two sums behind, and plain torch, which keeps the probabilities, is closer.
        size *= (16 * torch.finfo(dtype).eps / (64 * EPS) if dtype == torch.bfloat16 else 4) ** (1 / 3)
    for got, plain, exact in zip(ours, plain_grads, exact_grads, strict=True):
        accurate(got, plain, exact, size)


@pytest.mark.parametrize("head_dim", [1, 7, 8, 40, 64, 80, 100, 128, 192, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(library: CpuLibrary, head_dim: int, dtype: torch.dtype) -> None:
    check(library, (1, 2, 1, 45, 70, head_dim), dtype)


@pytest.mark.parametrize("segments", [None, "documents", "mixed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(200, 200), (40, 203), (203, 40)])  # blocks: several, one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(
    library: CpuLibrary, lengths: tuple[int, int], causal: bool, segments: str | None, dtype: torch.dtype
) -> None:
    check(library, (1, 1, 1, *lengths, 136), dtype, causal=causal, segments=segments)


@settings(max_examples=60, deadline=None)
@given(
    library=LIBRARY,
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    head_dim=st.integers(1, 130),
    dtype=DTYPE,
    causal=st.booleans(),
    segments=st.sampled_from([None, "documents", "mixed"]),
    drop=st.sampled_from([None, (0.3, 7, 0, 6), (0.9, 2**64 - 1, 2, 9)]),
    size=st.sampled_from([0.1, 1.0]),
    scale=st.sampled_from([None, None, 0.3, -0.1, 0.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    library: CpuLibrary,
    batch: int,
    groups: int,
    shared: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    check(library, (batch, groups * shared, groups, queries, keys, head_dim), dtype, **options)


@pytest.mark.parametrize("keys", [256, 270, 271])  # counters begin with a row of probabilities, or do not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(library: CpuLibrary, keys: int, dtype: torch.dtype) -> None:
    """Of a slice of the heads, what would be dropped of the probabilities of all heads."""
    check(library, (2, 2, 1, 100, keys, 16), dtype, drop=(0.2, 1 << 40, 3, 7))


def test_dropout_of_everything(library: CpuLibrary) -> None:
    check(library, (1, 1, 1, 20, 20, 16), torch.float32, drop=(1.0, 3, 0, 1))


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_numbers_pass_through(library: CpuLibrary, spoil: float, dtype: torch.dtype) -> None:
    check(library, (1, 2, 2, 20, 20, 32), dtype, spoil=spoil)
    check(library, (1, 2, 2, 1, 1, 32), dtype, spoil=spoil)  # all that it sees may be -inf


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 7, 64), (1, 2, 1, 0, 7, 64), (1, 2, 1, 5, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty(library: CpuLibrary, sizes: Sizes, dtype: torch.dtype) -> None:
    """No query: zero gradients of keys and values; no key: zero output."""
    batch, heads, groups, queries, keys, head_dim = sizes
    q = torch.ones(batch, heads, queries, head_dim, dtype=dtype)
    k = torch.ones(batch, groups, keys, head_dim, dtype=dtype)
    o, lse, grads = run(library, [q, k, k.clone(), q.clone()], sizes, 1.0, True, None, (0.1, 0, 0, heads))
    assert not any(x.any() for x in (o, *grads))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("head_dim", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(head_dim: int, dtype: torch.dtype) -> None:
    """Fewer heads than threads too, where several work on one."""
    library, threads, g = CpuLibrary(None), _built().omp_get_max_threads(), torch.Generator().manual_seed(0)
    for sizes in ((1, 2, 1, 600, 600, head_dim), (1, 4, 4, 300, 300, head_dim)):
        shapes = [(1, n, sizes[3], head_dim) for n in (sizes[1], sizes[2], sizes[2], sizes[1])]
        tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
        results = []
        try:
            for count in (1, 2, 3, 7):
                _built().omp_set_num_threads(count)
                o, lse, grads = run(library, tensors, sizes, 0.1, True, None, (0.1, 5, 0, 4))
                results.append([o, lse, *grads])
        finally:
            _built().omp_set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_plain_names_are_the_best_build() -> None:
    g, sizes = torch.Generator().manual_seed(0), (1, 1, 1, 100, 100, 64)
    tensors = [torch.randn(1, 1, 100, 64, generator=g).bfloat16() for _ in range(4)]
    plain, best = (
        run(CpuLibrary(isa), tensors, sizes, 0.1, True, None, (0.0, 0, 0, 1))
        for isa in (None, _supported()[-1])
    )
    assert all(torch.equal(a, b) for a, b in zip([*plain[:2], *plain[2]], [*best[:2], *best[2]], strict=True))


def test_the_forward_pass_alone_needs_no_lse(library: CpuLibrary) -> None:
    q = torch.randn(1, 1, 5, 8)
    o = torch.zeros_like(q)
    problem = [
        torch.float32,
        1,
        1,
        1,
        5,
        5,
        8,
        1.0,
        True,
        *given_strides([q, q, q]),
        None,
        None,
        0.0,
        0,
        0,
        1,
    ]
    library.call("attention_forward", *problem, *given_strides([o]), None)
    torch.testing.assert_close(
        o, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1)
    )


def test_what_it_refuses(library: CpuLibrary) -> None:
    """float16, and head sizes beyond 256."""
    q = torch.zeros(1, 1, 1, 257, dtype=torch.float16)
    for dtype, head_dim in ((torch.float16, 8), (torch.float32, 257)):
        problem = [
            dtype,
            1,
            1,
            1,
            1,
            1,
            head_dim,
            1.0,
            True,
            *given_strides([q, q, q]),
            None,
            None,
            0.0,
            0,
            0,
            1,
        ]
        with pytest.raises(AssertionError):
            library.call("attention_forward", *problem, *given_strides([q]), None)
