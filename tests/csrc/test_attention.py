"""The CUDA attention on the emulator, against float64; and bugs planted in it, which the same checks must catch."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.emulation import CSRC, EmulatorError, Library, compiled

Sizes = tuple[int, int, int, int, int, int]  # batch, heads, groups, queries, keys, head_dim
SOURCES = ("attention_forward.cu", "attention_backward.cu")


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain torch: output and log-sum-exp; a query that sees nothing gives zero."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    some = seen.any(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen & some, -math.inf)
    output = torch.where(some, scores.softmax(-1) @ v, torch.zeros((), dtype=q.dtype))
    return output, torch.where(some[..., 0], scores.logsumexp(-1), -math.inf)


def gradients(tensors: list[Tensor], grad: Tensor, seen: Tensor, scale: float) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    output, _ = attention(leaves[0], leaves[1], leaves[2], seen, scale)
    return list(torch.autograd.grad(output, leaves, grad))


def accurate(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error at most twice that of plain torch, and a sixteenth of a last place of the largest number."""
    assert torch.equal(ours.isfinite(), exact.isfinite()), "other numbers are finite"
    assert torch.equal(ours.isnan(), exact.isnan()), "NaN elsewhere"
    off, allowed = ((x.double() - exact)[exact.isfinite()].abs() for x in (ours, plain))
    if off.numel():
        floor = torch.finfo(ours.dtype).eps / 16 * exact[exact.isfinite()].abs().max().item()
        worst, bound = off.max().item(), 2 * allowed.nan_to_num().max().item() + floor
        assert worst <= bound, f"off by {worst:.3g}, where plain torch allows {bound:.3g}"


def spaced(values: Tensor) -> Tensor:
    """The same [b, h, s, d] inside [b, s, h, d + 8], as in a projection's output; NaN lies between."""
    b, h, s, d = values.shape
    buffer = torch.full((b, s, h, d + 8), math.nan, dtype=values.dtype)
    buffer[..., :d] = values.transpose(1, 2)
    return buffer[..., :d].transpose(1, 2)


def gap(view: Tensor) -> Tensor:
    """What lies between the rows of a `spaced` tensor."""
    b, h, s, d = view.shape
    return view.as_strided((b, s, h, 8), (s * h * (d + 8), h * (d + 8), d + 8, 1), d)


def given_strides(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor with its strides, as the interface takes them."""
    return [x for t in tensors for x in (t, torch.tensor(t.stride()[:3]))]


def visible(sizes: Sizes, causal: bool, segments: tuple[Tensor, Tensor] | None) -> Tensor:
    batch, _, _, queries, keys, _ = sizes
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - queries)
    if segments is not None:
        seen = seen & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    return seen


def draw_segments(sizes: Sizes, kind: str, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`documents`: ids that rise, those of the queries being the last of the keys'; `mixed`: in any order."""
    batch, _, _, queries, keys, _ = sizes
    if kind == "mixed":
        return tuple(torch.randint(-1, 2, (batch, n), generator=g).int() for n in (queries, keys))  # type: ignore
    ids = (torch.rand(batch, queries + keys, generator=g) < 0.03).cumsum(-1).int()
    return ids[:, keys:].contiguous(), ids[:, queries:].contiguous()


def check(
    library: Library,
    sizes: Sizes,
    dtype: torch.dtype = torch.bfloat16,
    *,
    causal: bool = True,
    segments: str | None = None,
    backward: bool = True,
    spoil: float | None = None,
    size: float = 1.0,
    seed: int = 0,
) -> None:
    """Forward, and backward from its results; `spoil` is a number put into the last query."""
    batch, heads, groups, queries, keys, head_dim = sizes
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, n, length, head_dim) for n, length in ((heads, queries), (groups, keys), (groups, keys))
    ]
    q, k, v, do = ((torch.randn(s, generator=g) * size).to(dtype) for s in (*shapes, shapes[0]))
    if spoil is not None:
        q[0, 0, -1, 1] = spoil
    ids = None if segments is None else draw_segments(sizes, segments, g)
    seen, scale = visible(sizes, causal, ids), head_dim**-0.5
    first, second = ids if ids is not None else (None, None)

    given = [spaced(x) for x in (q, k, v)]
    o, lse = spaced(torch.full_like(q, 7)), torch.full((batch, heads, queries), math.nan)
    problem = [dtype, *sizes, scale, causal, *given_strides(given), first, second]
    library.call("attention_forward", *problem, *given_strides([o]), lse)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), seen, scale)
    plain, _ = attention(q, k, v, seen, scale)
    accurate(o, plain, exact)
    assert gap(o).isnan().all(), "wrote between the rows"
    exact_lse[exact_lse == math.inf] = math.nan  # of a query whose probabilities are NaN
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if not backward:
        return
    do = spaced(do)
    results = [spaced(torch.full_like(x, 7)) for x in (q, k, v)]
    workspace = torch.full(
        (batch * heads * (queries + 127) // 128 * 128 * 2 + 256 * heads * batch,), math.nan
    )
    strided = [*given_strides([o]), lse, *given_strides([do]), *given_strides(results)]
    library.call("attention_backward", *problem, *strided, workspace)
    exact_grads = gradients([q.double(), k.double(), v.double()], do.double(), seen, scale)
    plain_grads = gradients([q, k, v], do, seen, scale)
    for ours, plain, exact in zip(results, plain_grads, exact_grads, strict=True):
        accurate(ours, plain, exact)
        assert gap(ours).isnan().all(), "wrote between the rows"


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check(compiled(*SOURCES), (1, 2, 1, 45, 70, head_dim), dtype)


@pytest.mark.parametrize("segments", [None, "documents", "mixed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [(150, 150), (40, 203), (203, 40)]
)  # tiles of queries and keys: several, one
def test_masks(lengths: tuple[int, int], causal: bool, segments: str | None) -> None:
    check(compiled(*SOURCES), (1, 1, 1, *lengths, 64), causal=causal, segments=segments)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 140),
    head_dim=st.integers(1, 16).map(lambda eighths: 8 * eighths),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    segments=st.sampled_from([None, "documents", "mixed"]),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    batch: int,
    groups: int,
    shared: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    segments: str | None,
    size: float,
    seed: int,
) -> None:
    sizes = (batch, groups * shared, groups, queries, keys, head_dim)
    check(compiled(*SOURCES), sizes, dtype, causal=causal, segments=segments, size=size, seed=seed)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 7, 64), (1, 2, 1, 0, 7, 64), (1, 2, 1, 5, 0, 64)])
def test_empty(sizes: Sizes) -> None:
    """No query: zero gradients of keys and values; no key: zero output."""
    batch, heads, groups, queries, keys, head_dim = sizes
    q, k = (
        torch.ones(batch, heads, queries, head_dim).half(),
        torch.ones(batch, groups, keys, head_dim).half(),
    )
    o, lse = torch.full_like(q, 7), torch.zeros(batch, heads, queries)
    dq, dk, dv = torch.full_like(q, 7), torch.full_like(k, 7), torch.full_like(k, 7)
    problem = [torch.float16, *sizes, 1.0, True, *given_strides([q, k, k]), None, None]
    compiled(*SOURCES).call("attention_forward", *problem, *given_strides([o]), lse)
    strided = [*given_strides([o]), lse, *given_strides([q, dq, dk, dv])]
    compiled(*SOURCES).call("attention_backward", *problem, *strided, torch.zeros(batch * heads * 256))
    assert not any(x.any() for x in (o, dq, dk, dv))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_bad_numbers_pass_through(spoil: float) -> None:
    check(compiled(*SOURCES), (1, 2, 2, 20, 20, 32), spoil=spoil, backward=False)


INVALID, MISALIGNED, UNSUPPORTED = 1, 716, 801


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dtype": torch.float32}, UNSUPPORTED),
        ({"head_dim": 12}, INVALID),
        ({"head_dim": 264}, INVALID),
        ({"groups": 3}, INVALID),
        ({"groups": 0}, INVALID),
        ({"scale": 0.0}, INVALID),
        ({"scale": math.nan}, INVALID),
        ({"segments_q": torch.zeros(1, 5, dtype=torch.int32)}, INVALID),
        ({"k_strides": torch.tensor([0, 0, 12])}, MISALIGNED),
        ({"o": torch.zeros(5 * 2 * 16 + 1).half()[1:]}, MISALIGNED),
    ],
)
def test_refuses(change: dict[str, object], error: int) -> None:
    q = torch.zeros(1, 2, 5, 16).half()
    sizes = {"batch": 1, "heads": 2, "groups": 2, "queries": 5, "keys": 5, "head_dim": 16}
    problem = {"dtype": torch.float16, **sizes, "scale": 1.0, "causal": False}
    tensors = {
        name: x for t in "qkv" for name, x in zip((t, f"{t}_strides"), given_strides([q]), strict=True)
    }
    o, o_strides = given_strides([q.clone()])
    rest = {"segments_q": None, "segments_k": None, "o": o, "o_strides": o_strides, "lse": torch.zeros(10)}
    arguments = problem | tensors | rest
    assert arguments.keys() >= change.keys()
    with pytest.raises(EmulatorError, match=f"error {error}:"):
        compiled(*SOURCES).call("attention_forward", *(arguments | change).values())


FORWARD, BACKWARD, TILE = "attention_forward.cu", "attention_backward.cu", "attention_tile.cuh"
BUGS = {
    "forward: no barrier": (
        FORWARD,
        "    __syncthreads();  // this tile is there",
        "    // this tile is there",
    ),
    "forward: waits for too little": (
        FORWARD,
        "    copy_async_wait<0>();\n    __sync",
        "    copy_async_wait<1>();\n    __sync",
    ),
    "forward: next tile over this one": (FORWARD, "load(next.first, stage ^ 1)", "load(next.first, stage)"),
    "forward: no rescale": (FORWARD, "if (shrink != 1.0f)", "if (false)"),
    "forward: sum of one lane": (FORWARD, "total += __shfl_xor_sync(kAllLanes, total, 2);", ""),
    "forward: keys beyond the end": (FORWARD, "key + Columns > p.keys ||", ""),
    "forward: diagonal tile not masked": (
        FORWARD,
        "key + Columns - 1 > query + p.shift()",
        "key > query + p.shift() + Rows",
    ),
    "forward: last tile left out": (
        FORWARD,
        "min(p.keys, query + Rows + p.shift())",
        "min(p.keys, query + p.shift())",
    ),
    "forward: other document not masked": (FORWARD, "masked = !range.same(own);", ""),
    "mask: off by one": (TILE, "key <= query + p.shift()", "key < query + p.shift()"),
    "mask: triangle from the top left": (TILE, "return keys - queries;", "return 0;"),
    "backward: rows for columns": (
        TILE,
        "KeyRows ? column + c : row + r, key",
        "KeyRows ? row + r : row + r, key",
    ),
    "documents: touching ranges left out": (TILE, "low <= other.high &&", "low < other.high &&"),
    "copy: other swizzle": (
        TILE,
        "copy_async(tile + Tile<D>::at(row, chunk)",
        "copy_async(tile + row * D + chunk * 8",
    ),
    "scores: other swizzle": (
        TILE,
        "2 * k, lane % 8 + lane / 16 * 8, lane / 8 % 2",
        "2 * k, lane % 8 + lane / 8 % 2 * 8, lane / 16",
    ),
    "values: rows of the wrong lanes": (
        TILE,
        "chunk + n, lane % 16, lane / 16",
        "chunk + n, lane / 2, lane % 2",
    ),
    "store: lanes not in step": (TILE, "  __syncwarp();\n  for (int i = lane", "  for (int i = lane"),
    "store: rows beyond the end": (TILE, "first + r < rows && column", "first + r <= rows && column"),
    "backward: no barrier": (
        BACKWARD,
        "    __syncthreads();  // this tile is there",
        "    // this tile is there",
    ),
    "backward: waits for too little": (
        BACKWARD,
        "    copy_async_wait<0>();\n    __sync",
        "    copy_async_wait<1>();\n    __sync",
    ),
    "backward: delta forgotten": (BACKWARD, "(dp[0][n][e] - mine[e].y)", "dp[0][n][e]"),
    "backward: half of delta": (BACKWARD, "int lanes = width / 2;", "int lanes = width / 4;"),
    "backward: queries beyond the end": (
        BACKWARD,
        "sum == -INFINITY ? INFINITY : sum * kLog2E",
        "sum * kLog2E",
    ),
    "backward: first queries left out": (
        BACKWARD,
        "max(0, row - p.shift()) / Columns",
        "max(0, row - p.shift() + Columns) / Columns",
    ),
    "backward: other heads of the group": (BACKWARD, "KeyRows ? head + heads : head + 1", "head + 1"),
    "backward: diagonal tile not masked": (
        BACKWARD,
        "last_key > first_query + p.shift()",
        "last_key > first_query + p.shift() + 2 * Rows",
    ),
    "backward: scale": (BACKWARD, "*= p.scale;", "*= 1.0f;"),
    "backward: stage of the rows": (BACKWARD, "stream_rows + stage * Columns : rows", "stream_rows : rows"),
}
ONE_SIZE = (  # compiles a sixteenth of the kernels
    (
        FORWARD,
        "dtype == MLITE_BF16 ? forward_by_size<Bf16> : forward_by_size<Fp16>",
        "launch_forward<Bf16, 64, 128, 64, 4>",
    ),
    (
        BACKWARD,
        "dtype == MLITE_BF16 ? backward_by_size<Bf16> : backward_by_size<Fp16>",
        "launch_backward<Bf16, 64, 64, 64, 8>",
    ),
)


def check_one_size(edits: tuple[tuple[str, str, str], ...] = (), backward: bool = True) -> None:
    library = compiled(*(SOURCES if backward else SOURCES[:1]), edits=(*ONE_SIZE, *edits))
    check(library, (1, 2, 1, 150, 213, 64), backward=backward)
    check(library, (1, 2, 1, 150, 213, 64), causal=False, segments="documents", backward=backward)


def test_one_size_is_right() -> None:
    check_one_size()


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    with pytest.raises((AssertionError, EmulatorError)) as caught:
        check_one_size((BUGS[bug],), backward=bug.startswith("backward"))
    print(bug, "->", caught.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str, architecture: str, tmp_path: Path) -> None:
    """Every head size keeps its tiles in registers; `pytest -rP` prints how many."""
    flags = [
        "-std=c++17",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-Xcompiler=-Wall,-Werror",
    ]
    command = [
        "nvcc",
        *flags,
        "-Xptxas=-v",
        "-c",
        str(CSRC / "cuda" / source),
        "-o",
        str(tmp_path / "object.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    kernels = re.findall(
        r"Compiling entry function '\w*mlite\d+(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    for name, *_, registers in kernels:
        print(f"sm_{architecture} {name}: {registers} registers")
    assert (
        len(kernels) == {FORWARD: 14, BACKWARD: 30}[source]
    )  # seven sizes, two types (and two passes, and delta)
    assert not [kernel for kernel in kernels if any(int(count) for count in kernel[1:4])]
