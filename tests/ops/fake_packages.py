"""Packages that are not installed here, as far as our adapters call them: the signatures are the real ones.

They compute with plain torch on the CPU and check what they are given, so that a wrong layout, scale, alignment of the
causal mask or length of a run shows as an error or as a wrong result.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE = (None, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """A module of that name, importable during the test, with its parents."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            install(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of [s, heads, d] to [t, groups, d], the last query seeing the last key: flash-attn's convention."""
    repeats = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) * scale
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.size(0) - q.size(0))
    return torch.einsum("hst,thd->shd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attend_runs(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, scale: float
) -> Tensor:
    assert q.dim() == k.dim() == v.dim() == 3
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert (cu_q[-1], cu_k[-1]) == (q.size(0), k.size(0))
    assert (cu_q.diff().max(), cu_k.diff().max()) == (longest_q, longest_k)
    bounds = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
    parts = [attend(q[a:b], k[c:d], v[c:d], scale) for a, b, c, d in bounds if b > a]
    return torch.cat(parts)


def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    assert causal and scale is not None and q.dim() == 4
    assert k.shape[:1] == q.shape[:1] and k.shape == v.shape and q.size(2) % k.size(2) == 0
    return torch.stack([attend(*row, scale) for row in zip(q, k, v, strict=True)])


def flash_attention(version: int) -> dict[str, Callable[..., Any]]:
    """The two functions of a version; version 4 gives the log-sum-exp beside the output."""

    def two(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False
    ) -> Any:
        assert dropout_p == 0
        return whole(q, k, v, causal, softmax_scale)

    def two_packed(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and dropout_p == 0
        return attend_runs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)

    def three(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, qv: Any = None) -> Any:
        assert qv is None
        return whole(q, k, v, causal, softmax_scale)

    def three_packed(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and seqused_q is seqused_k is None
        return attend_runs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)

    def four(
        q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None, softmax_scale: Any = None,
        causal: bool = False,
    ) -> Any:  # fmt: skip
        assert qv is gather_kv_indices is None
        return whole(q, k, v, causal, softmax_scale), None

    def four_packed(
        q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None, seqused_q: Any = None,
        seqused_k: Any = None, gather_kv_indices: Any = None, page_table: Any = None, softmax_scale: Any = None,
        causal: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and qv is seqused_q is seqused_k is page_table is None
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return attend_runs(q, k, v, *lengths, softmax_scale), None

    functions = {2: (two, two_packed), 3: (three, three_packed), 4: (four, four_packed)}[version]
    return dict(zip(("flash_attn_func", "flash_attn_varlen_func"), functions, strict=True))


class DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
    ) -> None:  # fmt: skip
        super().__init__()
        assert attention_dropout == 0 and num_gqa_groups is not None
        self.shape, self.format, self.mask = (num_attention_heads, num_gqa_groups), qkv_format, attn_mask_type
        self.scale = kv_channels**-0.5

    def forward(
        self, query_layer: Any, key_layer: Any, value_layer: Any, attention_mask: Any = None,
        qkv_format: Any = None, cu_seqlens_q: Any = None, cu_seqlens_kv: Any = None,
        cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None, attn_mask_type: Any = None,
    ) -> Tensor:  # fmt: skip
        assert attention_mask is cu_seqlens_q_padded is cu_seqlens_kv_padded is None
        assert (query_layer.size(-2), key_layer.size(-2)) == self.shape
        mask = attn_mask_type or self.mask
        if (qkv_format or self.format) == "thd":
            assert mask == "padding_causal_bottom_right"
            lengths = (cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
            return attend_runs(query_layer, key_layer, value_layer, *lengths, self.scale).flatten(-2)
        assert self.format == "bshd"
        same = query_layer.size(1) == key_layer.size(1)
        assert mask == ("causal" if same else "causal_bottom_right"), "causal is from the first key"
        return whole(query_layer, key_layer, value_layer, True, self.scale).flatten(-2)


class _Norm(torch.autograd.Function):
    """As the real one, it reads the weight from the module in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return module.compute(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *parameters = (p.detach().requires_grad_() for p in (*ctx.saved_tensors, *ctx.module.parameters()))
        with torch.enable_grad():
            y = ctx.module.compute(x, *parameters)
        dx, *others = torch.autograd.grad(y, (x, *parameters), grad)
        return dx, None, *others


class LayerNorm(nn.Module):
    names = ("weight", "bias")

    def __init__(self, normalized_shape: int, eps: float, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        for name in self.names:
            self.register_parameter(
                name, nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))
            )

    def forward(self, x: Tensor) -> Tensor:
        assert not any(p.is_meta for p in self.parameters())
        y: Tensor = _Norm.apply(x, self, *self.parameters())
        return y

    def compute(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, eps=self.eps)


class RMSNorm(LayerNorm):
    names = ("weight",)

    def compute(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], *parameters, eps=self.eps)


class Float8CurrentScaling:
    """The recipe."""


RECIPES: list[Float8CurrentScaling] = []


@contextmanager
def autocast(enabled: bool = True, calibrating: bool = False, recipe: Any = None) -> Iterator[None]:
    assert enabled and not calibrating and isinstance(recipe, Float8CurrentScaling)
    RECIPES.append(recipe)
    yield
    RECIPES.pop()


def fp8(x: Tensor) -> Tensor:
    """x as E4M3 with its own scale holds it."""
    scale = 448 / x.detach().abs().max()
    return x + ((x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale - x).detach()


class Linear(nn.Module):
    made: ClassVar[list["Linear"]] = []

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, params_dtype: Any = None,
        device: str = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        assert device == "meta" and params_dtype is not None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=params_dtype)) if bias else None
        )
        Linear.made.append(self)

    def forward(self, inp: Tensor) -> Tensor:
        assert RECIPES and not self.weight.is_meta and self.weight.dtype == inp.dtype
        assert not (inp.size(-1) % 16 or inp[..., 0].numel() % 8 or self.weight.size(0) % 16)
        return F.linear(fp8(inp), fp8(self.weight), self.bias)


def install_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    Linear.made.clear()
    install(
        monkeypatch,
        "transformer_engine.pytorch",
        DotProductAttention=DotProductAttention,
        LayerNorm=LayerNorm,
        RMSNorm=RMSNorm,
        Linear=Linear,
        autocast=autocast,
    )
    install(monkeypatch, "transformer_engine.common.recipe", Float8CurrentScaling=Float8CurrentScaling)


def install_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_layer_norm_affine(
        input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float = 1e-6
    ) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight.contiguous(), bias.contiguous(), eps)

    def fused_rms_norm_affine(
        input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6
    ) -> Tensor:
        return F.rms_norm(input, normalized_shape, weight, eps)

    install(monkeypatch, "fused_layer_norm_cuda")
    functions = SimpleNamespace(
        fused_layer_norm_affine=fused_layer_norm_affine, fused_rms_norm_affine=fused_rms_norm_affine
    )
    install(monkeypatch, "apex.normalization.fused_layer_norm", **vars(functions))
