"""What a run needs of its kernels, and what a backend says about itself; the backends are listed in `registry`."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lite.config import Config

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Needs:
    """What a run asks of its kernels: everything that decides whether a backend can serve it.

    Attributes:
        device: "cpu" or "cuda".
        capability: compute capability of the CUDA device, (9, 0) for Hopper; None on the CPU.
        head_dim: width of one attention head.
        grouped: whether several query heads share one key/value head.
        attention_dropout: whether attention probabilities are dropped.
        documents: whether attention is kept within documents: "none"; "runs": the tokens of a document are
            neighbours, as those of our loader and of padded prompts; "scattered": they need not be.
        linear_sizes: what the sizes of the linears' GEMMs are, on this rank: features, and tokens of a micro-batch.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    capability: tuple[int, int] | None = None
    head_dim: int = 64
    grouped: bool = False
    attention_dropout: bool = False
    documents: Literal["none", "runs", "scattered"] = "none"
    linear_sizes: tuple[int, ...] = ()

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> "Needs":
        """Those of a device that is there."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device.type, dtype, capability)

    @classmethod
    def of(cls, config: Config, device: torch.device, dtype: torch.dtype) -> "Needs":
        """Those of the training run that `config` describes."""
        model, ranks = config.model, config.parallel.tensor
        heads, gated = model.num_attention_heads, 2 if model.activation == "swiglu" else 1
        split = (heads, heads + 2 * model.query_groups)
        features = [model.hidden_size, *(n * model.head_dim // ranks for n in split)]
        features += [model.ffn_size // ranks, gated * model.ffn_size // ranks]
        return replace(
            cls.on(device, dtype),
            head_dim=model.head_dim,
            grouped=model.query_groups < heads,
            attention_dropout=model.attention_dropout > 0,
            documents="runs" if config.data.reset_attention_mask else "none",
            linear_sizes=(*features, config.train.micro_batch_size * model.seq_length),
        )

    def lacks_gpu(self, least: tuple[int, int], below: tuple[int, int] | None = None) -> Iterator[str]:
        """Why this is not a CUDA device with a capability from `least` on and less than `below`."""
        if self.capability is None:
            yield "it needs an NVIDIA GPU"
        elif self.capability < least or (below is not None and self.capability >= below):
            upper = f" and less than {_dotted(below)}" if below else ""
            yield f"it needs a GPU of capability {_dotted(least)}{upper}, not {_dotted(self.capability)}"

    def lacks_tensor_cores(self) -> Iterator[str]:
        """Why a kernel on tensor cores does not take this type."""
        if self.dtype not in HALVES:
            yield f"it takes bf16 and fp16, not {name_of(self.dtype)}"

    def lacks_head_dim(self, most: int, multiple: int = 1) -> Iterator[str]:
        """Why a kernel for heads up to a width, a multiple of a number, does not take these."""
        if self.head_dim > most:
            yield f"head_dim {self.head_dim} is more than {most}"
        if self.head_dim % multiple:
            yield f"head_dim {self.head_dim} is no multiple of {multiple}"

    def lacks_own_dropout(self) -> Iterator[str]:
        """Why a kernel with random numbers of its own, or none, cannot drop attention probabilities."""
        if self.attention_dropout:
            yield "it has no attention dropout that is the same on every layout"

    def lacks_runs(self) -> Iterator[str]:
        """Why a kernel for packed sequences does not take these documents."""
        if self.documents == "scattered":
            yield "it takes documents only if their tokens are neighbours"


@dataclass(frozen=True)
class Backend:
    """One way to compute some groups of operations.

    Attributes:
        groups: those it may serve.
        lacks: `lacks(group, needs)`: why it cannot serve a group, in plain words; nothing where it can.
        load: `load(group)`: its functions by operation; called only where it can serve.
    """

    groups: tuple[str, ...]
    lacks: Callable[[str, Needs], Iterator[str]]
    load: Callable[[str], dict[str, Callable[..., Any]]]

    def why_not(self, group: str, needs: Needs) -> str | None:
        """Every reason for which it cannot serve a group; None: it can."""
        return "; ".join(dict.fromkeys(self.lacks(group, needs))) or None


def lacks_package(module: str, name: str, install: str, *, importing: bool) -> Iterator[str]:
    """Why `name` cannot be had from a module of another package.

    Args:
        install: how to get it, for the message.
        importing: whether to import it, too; there is no need to where something else is lacking.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        yield f"{package} is not installed ({install})"
    elif importing:
        try:
            if not hasattr(importlib.import_module(module), name):
                yield f"{module} is there without {name} ({install})"
        except Exception as error:  # whatever a broken package does must not end a run that can do without it
            yield f"{module} cannot be imported: {str(error).splitlines()[0] if str(error) else repr(error)}"


def with_residual(
    layer_norm: Callable[..., Tensor], rms_norm: Callable[..., Tensor]
) -> dict[str, Callable[..., Any]]:
    """The four operations on norms from the two without a residual."""

    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return layer_norm(total, weight, bias, eps), total

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm(total, weight, eps), total

    return {
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
        "add_layer_norm": add_layer_norm,
        "add_rms_norm": add_rms_norm,
    }


def name_of(dtype: torch.dtype) -> str:
    """The type's name in configurations, as bf16."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
