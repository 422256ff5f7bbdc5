"""Transformer Engine, where it is installed: attention, norms, and linear layers in FP8.

Its modules are called with our parameters in place of their own, so that names, checkpoints and ZeRO are those of any
other run. The calls follow the sources of release 2.20; they have never run on a GPU.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_lite.ops.arguments import Documents, ProbabilityDropout
from megatron_lite.ops.backends import Needs, lacks_package, name_of, with_residual

_INSTALL = 'pip install --no-build-isolation "transformer-engine[pytorch]>=2.9"'


def _lacks_it(reasons: list[str]) -> Iterator[str]:
    """`reasons`, and why release 2.9 or a newer one is not there."""
    yield from reasons
    yield from lacks_package("transformer_engine.pytorch", "autocast", _INSTALL, importing=not reasons)


def lacks(group: str, needs: Needs) -> Iterator[str]:
    reasons = list(needs.lacks_gpu((8, 0)))
    if group == "attention":
        reasons += [*needs.lacks_tensor_cores(), *needs.lacks_head_dim(256, 8)]
        reasons += [*needs.lacks_own_dropout(), *needs.lacks_runs()]
    yield from _lacks_it(reasons)


def lacks_fp8(group: str, needs: Needs) -> Iterator[str]:
    reasons = list(needs.lacks_gpu((8, 9)))
    if needs.dtype != torch.bfloat16:
        reasons.append(f"it takes bf16, not {name_of(needs.dtype)}")
    if odd := sorted({size for size in needs.linear_sizes if size % 16}):
        reasons.append(
            f"sizes on a rank, and tokens of a micro-batch, must be multiples of 16: {', '.join(map(str, odd))}"
        )
    yield from _lacks_it(reasons)


def load(group: str) -> dict[str, Callable[..., Any]]:
    return {"attention": attention} if group == "attention" else with_residual(layer_norm, rms_norm)


def load_fp8(group: str) -> dict[str, Callable[..., Any]]:
    return {"linear": fp8_linear}


@cache
def _package() -> Any:
    return importlib.import_module("transformer_engine.pytorch")


@cache
def _core(heads: int, groups: int, head_dim: int) -> nn.Module:
    core: nn.Module = _package().DotProductAttention(
        heads, head_dim, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="bshd"
    )
    return core


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """The same function as `reference.attention`, without dropout."""
    assert dropout is None, "a run with attention dropout does not get this backend"
    b, heads, s, d = q.shape
    core = _core(heads, k.size(1), d)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, s, heads, d]
    if documents is None:
        out = core(q, k, v, attn_mask_type="causal" if s == k.size(1) else "causal_bottom_right")
    else:
        runs = documents.runs
        out = core(
            *(x.flatten(0, 1) for x in (q, k, v)),
            qkv_format="thd",
            cu_seqlens_q=runs.queries,
            cu_seqlens_kv=runs.keys,
            max_seqlen_q=runs.longest_queries,
            max_seqlen_kv=runs.longest_keys,
            attn_mask_type="padding_causal_bottom_right",
        )
    return out.view(b, s, heads, d).transpose(1, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    bias = torch.zeros_like(weight) if bias is None else bias  # it has none without a bias
    return _norm("LayerNorm", x, eps, weight=weight, bias=bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm("RMSNorm", x, eps, weight=weight)


def _norm(name: str, x: Tensor, eps: float, **parameters: Tensor) -> Tensor:
    """A module for this call alone: its backward pass reads the weight from the module again."""
    module = getattr(_package(), name)(x.size(-1), eps=eps, device="meta", dtype=x.dtype)
    module._parameters.update(parameters)
    y: Tensor = module(x)
    return y


@cache
def _linear(out_features: int, in_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    """A module without weights of its own, for all layers of a shape."""
    module: nn.Module = _package().Linear(
        in_features, out_features, bias=bias, params_dtype=dtype, device="meta"
    )
    return module


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with its three products in FP8: E4M3 forward, E5M2 for gradients (arXiv:2209.05433).

    Scales are taken from each tensor as it is (current scaling), so that there is no state beside the weights.

    Shapes:
        x [..., in], weight [out, in], bias [out] -> [..., out], bf16; in, out and the number of rows are multiples
        of 16.
    """
    te, recipe = _package(), importlib.import_module("transformer_engine.common.recipe")
    module = _linear(*weight.shape, bias is not None, weight.dtype)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    with te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling()):
        y: Tensor = functional_call(module, parameters, (x,))
    return y
