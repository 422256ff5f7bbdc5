"""Which implementation serves each operation: chosen once at start, from the configuration."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_lite.config import KernelsConfig
from megatron_lite.ops import reference, sdpa

logger = logging.getLogger(__name__)

ATTENTION: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa.attention, "reference": reference.attention}


@dataclass(frozen=True)
class Ops:
    """The operations a model is built from; the signatures are those of `ops.reference`."""

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
    chosen: dict[str, str] = field(default_factory=dict)


def build_ops(kernels: KernelsConfig) -> Ops:
    """Picks the implementations.

    Raises:
        ValueError: a backend asked for by name does not exist; the message lists those that do.
    """
    name = "sdpa" if kernels.attention == "auto" else kernels.attention
    if name not in ATTENTION:
        raise ValueError(f"kernels.attention: no backend {name!r}; there are auto, {', '.join(ATTENTION)}")
    return Ops(attention=ATTENTION[name], chosen={"attention": name})
