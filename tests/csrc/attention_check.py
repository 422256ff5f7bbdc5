"""The check of the CUDA attention, on the emulator or a GPU, against float64."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.csrc.emulation import Library

Sizes = tuple[int, int, int, int, int, int]  # batch, heads, groups, queries, keys, head_dim
Drop = tuple[float, int, int, int]  # probability, seed, first head, number of heads of all slices
SOURCES = ("attention_forward.cu", "attention_backward.cu")


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain torch: output and log-sum-exp; a query that sees nothing gives zero. `factors`: dropout's."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    some = seen.any(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen & some, -math.inf)
    output = torch.where(some, scores.softmax(-1) * factors.to(q.dtype) @ v, torch.zeros((), dtype=q.dtype))
    return output, torch.where(some[..., 0], scores.logsumexp(-1), -math.inf)


def gradients(
    tensors: list[Tensor], grad: Tensor, seen: Tensor, scale: float, factors: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    output, _ = attention(leaves[0], leaves[1], leaves[2], seen, scale, factors)
    return list(torch.autograd.grad(output, leaves, grad))


def philox(seed: int, numbers: np.ndarray) -> np.ndarray:
    """The four words of each counter (`numbers`, uint64): [..., 4], uint64."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = numbers & low, numbers >> half, np.zeros_like(numbers), np.zeros_like(numbers)
    for i in range(10):
        left, right = (
            (seed >> 32 * j) + i * step & 0xFFFFFFFF for j, step in enumerate((0x9E3779B9, 0xBB67AE85))
        )
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (second >> half) ^ b ^ np.uint64(left), second & low
        c, d = (first >> half) ^ d ^ np.uint64(right), first & low
    return np.stack((a, b, c, d), -1)


def dropout_factors(sizes: Sizes, drop: Drop) -> Tensor:
    """What attention.h multiplies the probabilities with, [batch, heads, queries, keys], written after its words."""
    batch, heads, _, queries, keys, _ = sizes
    p, seed, first_head, all_heads = drop
    if p == 0:
        return torch.ones(1, 1, 1, 1, dtype=torch.float64)
    plane = np.arange(batch)[:, None] * all_heads + first_head + np.arange(heads)
    query = plane[..., None] * queries + np.arange(queries)
    index = (query[..., None] * keys + np.arange(keys)).astype(np.uint64)
    words = np.take_along_axis(
        philox(seed, index // np.uint64(4)), (index % np.uint64(4)).astype(np.int64)[..., None], -1
    )[..., 0]
    dropped = torch.from_numpy(words < np.uint64(min(int(p * 2**32), 2**32)))
    factors = torch.zeros(dropped.shape, dtype=torch.float64)
    return factors.masked_fill(~dropped, 0.0 if p >= 1 else 1 / (1 - p))


def accurate(ours: Tensor, plain: Tensor, exact: Tensor, size: float) -> None:
    """Error at most twice that of plain torch, and what rounding does to sums of numbers of this `size` in fp32.

    Beside that a sixteenth of a last place of the largest number. Where there are too few numbers for torch's largest
    error to mean much, a whole one and four times as much: a gradient of one key is a sum over all queries, and that
    of torch may round luckily.
    """
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), "other numbers are finite"
    assert torch.equal(ours.isnan(), exact.isnan()), "NaN elsewhere"
    off, allowed = ((x.double() - exact)[finite].abs() for x in (ours, plain))
    if off.numel():
        few = off.numel() <= 1000
        place = torch.finfo(ours.dtype).eps * exact[finite].abs().max().item()
        rounding = torch.finfo(torch.float32).eps * 64 * size**3
        floor = 4 * (place + rounding) if few else place / 16 + rounding
        worst, bound = off.max().item(), 2 * allowed.nan_to_num().max().item() + floor
        assert worst <= bound, f"off by {worst:.3g}, where plain torch allows {bound:.3g}"


def spaced(values: Tensor) -> Tensor:
    """The same [b, h, s, d] inside [b, s, h, d + 8], as in a projection's output; NaN lies between."""
    b, h, s, d = values.shape
    buffer = torch.full((b, s, h, d + 8), math.nan, dtype=values.dtype, device=values.device)
    buffer[..., :d] = values.transpose(1, 2)
    return buffer[..., :d].transpose(1, 2)


def gap(view: Tensor) -> Tensor:
    """What lies between the rows of a `spaced` tensor."""
    b, h, s, d = view.shape
    return view.as_strided((b, s, h, 8), (s * h * (d + 8), h * (d + 8), d + 8, 1), d)


def given_strides(tensors: list[Tensor]) -> list[Any]:
    """Each tensor with its strides, as the interface takes them."""
    return [x for t in tensors for x in (t, t.stride()[:3])]


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
    drop: Drop | None = None,
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
    drop = drop or (0.0, 0, 0, heads)
    q, k, v, do, seen, factors = (
        x.to(library.device) for x in (q, k, v, do, visible(sizes, causal, ids), dropout_factors(sizes, drop))
    )
    scale = head_dim**-0.5

    given = [spaced(x) for x in (q, k, v)]
    o, lse = spaced(torch.full_like(q, 7)), torch.full((batch, heads, queries), math.nan, device=q.device)
    problem = [dtype, *sizes, scale, causal, *given_strides(given), *(ids or (None, None)), *drop]
    library.call("attention_forward", *problem, *given_strides([o]), lse)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), seen, scale, factors)
    plain, _ = attention(q, k, v, seen, scale, factors)
    accurate(o, plain, exact, size)
    assert gap(o).isnan().all(), "wrote between the rows"
    exact_lse[exact_lse == math.inf] = math.nan  # of a query whose probabilities are NaN
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if not backward:
        return
    do = spaced(do)
    results = [spaced(torch.full_like(x, 7)) for x in (q, k, v)]
    workspace = torch.full(
        (library.number("attention_workspace", batch, heads, queries, head_dim) // 4,), math.nan
    )
    strided = [*given_strides([o]), lse, *given_strides([do]), *given_strides(results)]
    library.call("attention_backward", *problem, *strided, workspace)
    exact_grads = gradients([q.double(), k.double(), v.double()], do.double(), seen, scale, factors)
    plain_grads = gradients([q, k, v], do, seen, scale, factors)
    for ours, plain, exact in zip(results, plain_grads, exact_grads, strict=True):
        accurate(ours, plain, exact, size)
        assert gap(ours).isnan().all(), "wrote between the rows"
