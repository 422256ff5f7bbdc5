"""The norms of NVIDIA's apex, where it is installed from its source.

The calls follow the source of apex/normalization/fused_layer_norm.py; they have never run on a GPU.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.backends import Needs, lacks_package, with_residual

_MODULE = "apex.normalization.fused_layer_norm"
_INSTALL = "from its source, github.com/NVIDIA/apex, with --cuda_ext: PyPI's apex is an unrelated package"


def lacks(group: str, needs: Needs) -> Iterator[str]:
    reasons = list(needs.lacks_gpu((7, 0)))
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        reasons.append(f"NVIDIA's apex is not installed ({_INSTALL})")
    yield from reasons
    if not reasons:
        yield from lacks_package(_MODULE, "fused_rms_norm_affine", _INSTALL, importing=True)


def load(group: str) -> dict[str, Callable[..., Any]]:
    functions = importlib.import_module(_MODULE)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        bias = torch.zeros_like(weight) if bias is None else bias  # it takes none but with a bias
        y: Tensor = functions.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
        return y

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor = functions.fused_rms_norm_affine(x, weight, weight.shape, eps)
        return y

    return with_residual(layer_norm, rms_norm)
