"""Which implementation serves each operation: chosen once at start, from the configuration and what is there."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_lite.config import KernelsConfig
from megatron_lite.ops import apex, compiled, flash_attention, reference, sdpa, transformer_engine
from megatron_lite.ops.backends import Backend, Needs

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "norm": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "activation": ("gelu", "gelu_tanh", "swiglu"),
    "rotary": ("rotary",),
    "dropout": ("dropout",),
    "softmax": ("softmax",),
    "cross_entropy": ("cross_entropy_stats", "cross_entropy_grad"),
    "linear": ("linear",),
}
"""The operations by the key of `kernels` that chooses their backend."""

_OURS = tuple(group for group in GROUPS if group != "linear")
_ATTENTION = ("attention",)


@dataclass(frozen=True)
class Ops:
    """The operations a model is built from; the signatures are those of `ops.reference`.

    Attributes:
        chosen: backend of each group.
        why: what speaks for it, in few words.
    """

    layer_norm: Callable[..., Tensor] = reference.layer_norm
    rms_norm: Callable[..., Tensor] = reference.rms_norm
    gelu: Callable[..., Tensor] = reference.gelu
    gelu_tanh: Callable[..., Tensor] = reference.gelu_tanh
    swiglu: Callable[..., Tensor] = reference.swiglu
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]] = reference.add_layer_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = reference.add_rms_norm
    rotary: Callable[..., tuple[Tensor, Tensor]] = reference.rotary
    dropout: Callable[..., Tensor] = reference.dropout
    softmax: Callable[..., Tensor] = reference.softmax
    attention: Callable[..., Tensor] = reference.attention
    cross_entropy_stats: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.cross_entropy_stats
    cross_entropy_grad: Callable[..., Tensor] = reference.cross_entropy_grad
    linear: Callable[..., Tensor] = F.linear
    chosen: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def table(self) -> list[str]:
        """The choice, a line a group."""
        return [f"{group:<13}  {name:<18}  {self.why[group]}" for group, name in self.chosen.items()]


def _native_lacks(group: str, needs: Needs) -> Iterator[str]:
    native = importlib.import_module("megatron_lite.ops.native")
    for operation in GROUPS[group]:
        if reason := native.serves(needs.device, needs.dtype, operation):
            yield reason
    if needs.device == "cuda":
        yield from needs.lacks_gpu((8, 0))
    if group == "attention":
        yield from needs.lacks_head_dim(256, 8 if needs.device == "cuda" else 1)


def _nothing(group: str, needs: Needs) -> Iterator[str]:
    yield from ()


def _load_from(module: str, group: str) -> dict[str, Callable[..., Any]]:
    namespace = importlib.import_module(module)
    return {name: getattr(namespace, name) for name in GROUPS[group]}


def _sdpa(kernel: SDPBackend | None = None) -> Backend:
    return Backend(_ATTENTION, partial(sdpa.lacks, kernel=kernel), partial(sdpa.load, kernel=kernel))


def _flash(version: int) -> Backend:
    lacks, load = flash_attention.lacks, flash_attention.load
    return Backend(_ATTENTION, partial(lacks, version=version), partial(load, version=version))


BACKENDS: dict[str, Backend] = {
    # Our kernels (csrc).
    "native": Backend(_OURS, _native_lacks, partial(_load_from, "megatron_lite.ops.native")),
    # Packages that may be installed.
    "flash_attn_2": _flash(2),
    "flash_attn_3": _flash(3),
    "flash_attn_4": _flash(4),
    "transformer_engine": Backend(("attention", "norm"), transformer_engine.lacks, transformer_engine.load),
    "fp8": Backend(("linear",), transformer_engine.lacks_fp8, transformer_engine.load_fp8),
    "apex": Backend(("norm",), apex.lacks, apex.load),
    # torch's scaled_dot_product_attention, with the kernel that torch chooses or with one by name.
    "sdpa": _sdpa(),
    "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    # Plain torch, as it is and through torch.compile.
    "torch": Backend(("linear",), _nothing, lambda group: {"linear": F.linear}),
    "compile": Backend(_OURS, compiled.lacks, lambda group: compiled.load(GROUPS[group])),
    "reference": Backend(_OURS, _nothing, partial(_load_from, "megatron_lite.ops.reference")),
}
"""Every backend: what it may serve, why it may not, and where its functions are."""

# What `auto` tries for attention on a GPU, best first, by least capability: published forward and backward rates on
# Hopper (bf16, head_dim 128) are 648/561 TFLOP/s for FlashAttention-3, 595/516 for cuDNN, 370/322 for FlashAttention-2.
_GPU_ATTENTION = {
    (10, 0): ("flash_attn_4", "sdpa_cudnn", "flash_attn_2", "native", "sdpa", "reference"),
    (9, 0): ("flash_attn_3", "sdpa_cudnn", "flash_attn_2", "native", "sdpa", "reference"),
    (8, 0): ("flash_attn_2", "sdpa_flash", "native", "sdpa", "reference"),
    (0, 0): ("sdpa", "reference"),
}


def preference(group: str, needs: Needs) -> tuple[str, ...]:
    """What `auto` tries, best first; the rest is to be had by name only."""
    if group == "linear":
        return ("torch",)
    if group != "attention":
        return ("native", "reference")
    if needs.capability is None:
        return ("native", "sdpa", "reference")
    return next(order for least, order in _GPU_ATTENTION.items() if needs.capability >= least)


def usable(group: str, needs: Needs) -> list[str]:
    """The backends that can serve a group, those that `auto` prefers first."""
    order = preference(group, needs)
    others = [name for name, backend in BACKENDS.items() if group in backend.groups and name not in order]
    return [name for name in (*order, *others) if BACKENDS[name].why_not(group, needs) is None]


def build_ops(kernels: KernelsConfig, needs: Needs | None = None) -> Ops:
    """Picks the implementations for a run that needs `needs` (by default, those of fp32 on the CPU).

    Raises:
        ValueError: backends asked for by name do not exist or cannot serve the run; the message says why, and what
            can instead.
    """
    needs = needs or Needs()
    functions: dict[str, Callable[..., Any]] = {}
    chosen, why, problems = {}, {}, []
    for group in GROUPS:
        try:
            chosen[group], why[group] = _choose(group, getattr(kernels, group), needs)
        except ValueError as error:
            problems.append(str(error))
            continue
        functions |= BACKENDS[chosen[group]].load(group)
    if problems:
        raise ValueError("\n".join(problems))
    return Ops(**functions, chosen=chosen, why=why)


def _choose(group: str, asked: str, needs: Needs) -> tuple[str, str]:
    """The backend of a group, and why it."""
    if asked == "auto":
        return _best(group, needs)
    if asked not in BACKENDS or group not in BACKENDS[asked].groups:
        known = [name for name, backend in BACKENDS.items() if group in backend.groups]
        raise ValueError(f"kernels.{group}: no backend {asked!r}; there are auto, {', '.join(known)}")
    if reason := BACKENDS[asked].why_not(group, needs):
        raise ValueError(
            f"kernels.{group}: {asked} cannot serve this run: {reason}; what can: auto, "
            f"{', '.join(usable(group, needs))}"
        )
    return asked, "by name"


def _best(group: str, needs: Needs) -> tuple[str, str]:
    order = preference(group, needs)
    passed: list[str] = []
    for place, name in enumerate(order):
        reason = BACKENDS[name].why_not(group, needs)
        if reason is None:
            rest = [f"before {', '.join(order[place + 1 :])}"] if order[place + 1 :] else []
            return name, "; ".join(["auto", *rest, *passed])
        passed.append(f"not {name}: {reason.split('; ')[0].split(' (')[0]}")
    raise AssertionError(f"the last of {order} serves everything")
