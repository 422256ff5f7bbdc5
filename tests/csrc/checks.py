"""One check per kernel: given sizes, it draws inputs, runs the kernel on the emulator and compares with float64.

The tests call these on drawn shapes, and on kernels with planted bugs, where they must fail.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.csrc.emulation import Library, same_or_better


def numbers(generator: torch.Generator, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, one element off every 16-byte boundary."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The output of `function` in `dtype` and the gradients of its inputs."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    found = torch.autograd.grad(output, leaves, grad.to(dtype), allow_unused=True)
    return output.detach(), [
        torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
    ]


def _norm(rms: bool, eps: float) -> Callable[..., Tensor]:
    def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if rms:
            y = F.rms_norm(x, x.shape[-1:], weight, eps)
            return y if bias is None else y + bias
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    return norm


def check_norm(
    library: Library,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    rms: bool = False,
    bias: bool = True,
    residual: bool = True,
    workspace_rows: int = 3,
    offset: bool = False,
    spoil: float | None = None,
    seed: int = 0,
) -> None:
    """Forward and backward; `spoil` is a number put into the first row."""
    g = torch.Generator().manual_seed(seed)
    eps, place = 1e-5, misaligned if offset else (lambda tensor: tensor)
    x, other, dy, dsum = (place(numbers(g, rows, cols, dtype=dtype)) for _ in range(4))
    weight, shift = (place(numbers(g, cols, dtype=dtype)) for _ in range(2))
    if spoil is not None:
        x[0, cols // 2] = spoil
    y, total, dx = (place(torch.zeros_like(x)) for _ in range(3))
    mean, rstd = torch.zeros(rows), torch.zeros(rows)
    library.call(
        "norm_forward", dtype, rms, rows, cols, eps, x, other if residual else None, weight, shift if bias else None,
        y, total if residual else None, None if rms else mean, rstd,
    )  # fmt: skip
    summed = x + other if residual else x
    if residual:
        assert torch.equal(total.nan_to_num(), summed.nan_to_num())

    dweight, dbias = torch.full((cols,), math.nan), torch.full((cols,), math.nan)
    workspace_rows = max(workspace_rows, rows // 40)  # as for the activations
    workspace = torch.full((workspace_rows, cols * (2 if bias else 1)), math.nan)
    library.call(
        "norm_backward", dtype, rms, rows, cols, dy, dsum if residual else None, summed, weight,
        None if rms else mean, rstd, dx, dweight, dbias if bias else None, workspace, workspace_rows,
    )  # fmt: skip
    inputs = [summed, weight] + ([shift] if bias else [])
    exact, exact_grads = gradients(_norm(rms, eps), inputs, dy, torch.float64)
    plain, plain_grads = gradients(_norm(rms, eps), inputs, dy, dtype)
    # Where terms of some size cancel, that size is told: x - mean times rstd, or sums of many rows.
    steep = rstd.nan_to_num().max().item() if rows else 0.0
    same_or_better(
        y, plain, exact, steep * summed.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if rows else 0.0
    )
    if residual:
        exact_grads[0] += dsum.double()
        plain_grads[0] += dsum
    for ours, plain_grad, exact_grad in zip((dx, dweight, dbias), plain_grads, exact_grads, strict=False):
        same_or_better(ours, plain_grad, exact_grad, 10 * steep if ours is dx else 10 * math.sqrt(rows))


def _swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    gate, up = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def check_activation(
    library: Library,
    kind: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    workspace_rows: int = 3,
    offset: bool = False,
    in_place: bool = False,
    spoil: float | None = None,
    seed: int = 0,
) -> None:
    """`kind`: gelu, gelu_tanh or swiglu."""
    g = torch.Generator().manual_seed(seed)
    place = misaligned if offset else (lambda tensor: tensor)
    width = 2 * cols if kind == "swiglu" else cols
    x = place(numbers(g, rows, width, dtype=dtype, size=3))
    dy = place(numbers(g, rows, cols, dtype=dtype))
    shift = place(numbers(g, width, dtype=dtype))
    if spoil is not None:
        x[0, width // 2] = spoil
    given: list[Any] = [dtype] if kind == "swiglu" else [dtype, kind == "gelu_tanh"]
    name = "swiglu" if kind == "swiglu" else "bias_gelu"
    dx = x.clone() if in_place else place(torch.zeros_like(x))
    y = dx[:] if in_place and width == cols else place(torch.zeros_like(dy))
    library.call(
        f"{name}_forward",
        *given,
        rows,
        cols,
        y if in_place and width == cols else x,
        shift if bias else None,
        y,
    )
    y = y.clone()
    dx.copy_(x)
    # Sums of more rows one after another lose more digits than torch's, which are nested.
    workspace_rows = max(workspace_rows, rows // 40)
    dbias, workspace = torch.full((width,), math.nan), torch.full((workspace_rows, width), math.nan)
    library.call(
        f"{name}_backward", *given, rows, cols, dy, dx if in_place else x, shift if bias else None, dx,
        dbias if bias else None, workspace, workspace_rows,
    )  # fmt: skip

    def function(x: Tensor, bias: Tensor | None = None) -> Tensor:
        if kind == "swiglu":
            return _swiglu(x, bias)
        return F.gelu(x if bias is None else x + bias, approximate="tanh" if kind == "gelu_tanh" else "none")

    inputs = [x] + ([shift] if bias else [])
    exact, exact_grads = gradients(function, inputs, dy, torch.float64)
    plain, plain_grads = gradients(function, inputs, dy, dtype)
    same_or_better(y, plain, exact)
    same_or_better(dx, plain_grads[0], exact_grads[0])
    if bias:
        same_or_better(dbias, plain_grads[1], exact_grads[1], 10 * math.sqrt(rows))


def check_softmax(
    library: Library,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    causal: bool = False,
    mask_heads: int | None = None,
    segments: bool = False,
    offset: bool = False,
    in_place: bool = False,
    spoil: float | None = None,
    seed: int = 0,
) -> None:
    """`mask_heads`: a mask of that many heads (1 or all of them); None, no mask."""
    batch, heads, queries, keys = shape
    g = torch.Generator().manual_seed(seed)
    place = misaligned if offset else (lambda tensor: tensor)
    x = place(numbers(g, *shape, dtype=dtype, size=4))
    if spoil is not None:
        x[0, 0, -1, 0] = spoil
    dy, scale = place(numbers(g, *shape, dtype=dtype)), 0.37
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    mask, strides = None, [0, 0, 0, 0]
    if mask_heads is not None:
        mask = torch.randint(0, 3, (batch, keys, mask_heads, queries), generator=g).to(torch.uint8)
        mask = mask.permute(0, 2, 3, 1)  # so that no stride is what one would guess
        strides = [mask.stride(0), mask.stride(1) if mask_heads > 1 else 0, mask.stride(2), mask.stride(3)]
        seen = seen & (mask != 0)
    segments_q = segments_k = None
    if segments:
        segments_k = torch.randint(0, 2, (batch, keys), generator=g).cumsum(-1).int()
        segments_q = torch.randint(0, max(keys // 2, 1), (batch, queries), generator=g).int()
        seen = seen & (segments_q[:, None, :, None] == segments_k[:, None, None, :])
    if causal:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    y = x.clone() if in_place else place(torch.full_like(x, math.nan))
    library.call(
        "softmax_forward",
        dtype,
        *shape,
        scale,
        y if in_place else x,
        mask,
        *strides,
        segments_q,
        segments_k,
        causal,
        y,
    )
    dx = y.clone() if in_place else place(torch.full_like(x, math.nan))
    library.call(
        "softmax_backward", dtype, batch * heads * queries, keys, scale, dy, dx if in_place else y, dx
    )

    def softmax(x: Tensor) -> Tensor:
        # A row that sees nothing is 0; the substitute keeps its NaN out of the gradient.
        some = seen.any(-1, keepdim=True)
        return torch.where(
            seen, (x * scale).masked_fill(~seen & some, -math.inf).softmax(-1), torch.zeros((), dtype=x.dtype)
        )

    exact, _ = gradients(softmax, [x], dy, torch.float64)
    plain, _ = gradients(softmax, [x], dy, dtype)
    same_or_better(y, plain, exact)

    def slope(dtype: torch.dtype) -> Tensor:
        p, d = y.to(dtype), dy.to(dtype)
        return scale * p * (d - (p * d).sum(-1, keepdim=True))

    same_or_better(dx, slope(dtype), slope(torch.float64), 2.0)


def check_cross_entropy(
    library: Library,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    slices: int = 1,
    padding: int = 0,
    z_loss: float = 0.0,
    offset: bool = False,
    spoil: float | None = None,
    whole_row: bool = False,
    seed: int = 0,
) -> None:
    """Over `slices` of `cols` columns each, the last `padding` columns of all being no tokens."""
    g = torch.Generator().manual_seed(seed)
    place = misaligned if offset else (lambda tensor: tensor)
    logits = numbers(g, rows, slices * cols, dtype=dtype, size=5)
    vocabulary = slices * cols - padding
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[:1] = min(cols, vocabulary - 1)  # the first of the second slice
    grad = torch.rand(rows, generator=g)
    logits[:, vocabulary:] = 1e4 if dtype == torch.float16 else 1e30  # who reads the padding is far off
    if spoil is not None:
        logits[0, slice(vocabulary) if whole_row else vocabulary // 2] = spoil
    parts = [place(part.clone(memory_format=torch.contiguous_format)) for part in logits.split(cols, dim=1)]
    valid = [min(max(vocabulary - i * cols, 0), cols) for i in range(slices)]
    stats = torch.full((slices, 3, rows), math.nan)
    for i, part in enumerate(parts):
        library.call("cross_entropy_stats", dtype, rows, cols, valid[i], i * cols, part, labels, *stats[i])
    largest = stats[:, 0].amax(0) if rows else torch.zeros(0)
    total = torch.where(stats[:, 1] == 0, 0.0, stats[:, 1] * (stats[:, 0] - largest).exp()).sum(0)
    lse = largest + total.log()
    for i, part in enumerate(parts):
        library.call(
            "cross_entropy_grad",
            dtype,
            rows,
            cols,
            valid[i],
            i * cols,
            part,
            labels,
            largest,
            total,
            grad,
            z_loss,
        )

    def losses(x: Tensor) -> Tensor:
        lse = x[:, :vocabulary].logsumexp(-1)
        return lse - x.gather(1, labels[:, None]).squeeze(1) + z_loss * lse.square()

    exact, (exact_grad,) = gradients(losses, [logits], grad, torch.float64)
    plain, (plain_grad,) = gradients(losses, [logits], grad, torch.float32)
    same_or_better(lse - stats[:, 2].sum(0) + z_loss * lse.square(), plain, exact, 20.0)
    same_or_better(torch.cat(parts, 1), plain_grad.to(dtype), exact_grad, 1.0)


def check_rotary(
    library: Library,
    sizes: tuple[int, int, int, int],
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    *,
    tables: bool = False,
    in_place: bool = False,
    offset: bool = False,
    seed: int = 0,
) -> None:
    """`sizes`: batch, positions, heads of q and of k. `tables`: one table per batch entry."""
    batch, seq, heads_q, heads_k = sizes
    g = torch.Generator().manual_seed(seed)
    # q and k as they come from the linear layer: [s, b, (heads_q + heads_k) * d]
    together = numbers(g, seq, batch, heads_q + heads_k, head_dim, dtype=dtype)
    together = misaligned(together) if offset else together
    x = together.clone()
    q, k = together[:, :, :heads_q], together[:, :, heads_q:]
    out = together if in_place else torch.full((batch, heads_q + heads_k, seq, head_dim), math.nan).to(dtype)
    q_out, k_out = (q, k) if in_place else (out[:, :heads_q], out[:, heads_q:])
    angles = torch.rand(batch if tables else 1, seq, rotary_dim, generator=g) * 6
    cos, sin = angles.cos(), (angles * 1.3).sin()

    def strides(t: Tensor, order: tuple[int, int, int]) -> list[int]:
        return [t.stride(dim) for dim in order]

    given, taken = (1, 0, 2), ((1, 0, 2) if in_place else (0, 2, 1))
    for inverse in (False, True):
        together.copy_(x)
        library.call(
            "rotary", dtype, batch, seq, heads_q, heads_k, head_dim, rotary_dim,
            q, *strides(q, given), k if heads_k else None, *strides(k, given),
            q_out, *strides(q_out, taken), k_out if heads_k else None, *strides(k_out, taken),
            cos, sin, seq * rotary_dim if tables else 0, inverse,
        )  # fmt: skip

        def rotate(x: Tensor) -> Tensor:
            c, s = (t.to(x.dtype)[:, :, None].transpose(0, 1) for t in (cos, sin))
            first, second = x[..., :rotary_dim].chunk(2, -1)
            turned = x[..., :rotary_dim] * c + torch.cat((-second, first), -1) * s
            return torch.cat((turned, x[..., rotary_dim:]), -1)

        def wanted(precision: torch.dtype, inverse: bool = inverse) -> Tensor:
            # The inverse is the gradient: that of the rotation, at x in the place of dy.
            rotated, (grad,) = gradients(rotate, [torch.zeros_like(x) if inverse else x], x, precision)
            return grad if inverse else rotated

        ours = out if in_place else out.permute(2, 0, 1, 3)
        same_or_better(ours, wanted(dtype), wanted(torch.float64))


def philox_words(seed: int, number: int) -> list[int]:
    """Philox4x32-10 of the counter (number's halves, 0, 0), written after the paper (Salmon et al. 2011)."""
    low = 0xFFFFFFFF
    counter, key = [number & low, number >> 32, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & low, (a >> 32) ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def check_dropout(
    library: Library,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    p: float = 0.3,
    row_stride: int | None = None,
    start: int = 0,
    dropout_seed: int = 1234,
    offset: bool = False,
    seed: int = 0,
) -> None:
    """Against the random numbers of the paper, element by element."""
    g = torch.Generator().manual_seed(seed)
    x = numbers(g, rows, cols, dtype=dtype)
    x = misaligned(x) if offset else x
    y = torch.full_like(x, math.nan)
    stride = cols if row_stride is None else row_stride
    library.call("dropout", dtype, rows, cols, stride, start, p, dropout_seed, x, y)
    indices = [[start + r * stride + c for c in range(cols)] for r in range(rows)]
    words = [[philox_words(dropout_seed, i // 4)[i % 4] for i in row] for row in indices]
    kept = torch.tensor(words, dtype=torch.float64).view(rows, cols) >= math.floor(p * 2**32)
    factor = torch.tensor(0.0 if p >= 1 else 1 / (1 - p), dtype=torch.float32)
    assert torch.equal(y, (x.float() * torch.where(kept, factor, 0.0)).to(dtype))
