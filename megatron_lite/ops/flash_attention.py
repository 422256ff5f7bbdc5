"""FlashAttention 2, 3 and 4 (Dao 2023, arXiv:2307.08691, and its successors), where they are installed.

The three are packages of their own with nearly the same functions. The calls follow the sources of flash-attn 2.8.3,
of its folder hopper, and of flash-attn-4 4.0.0b9; they have never run on a GPU. Gradients of queries are summed by
atomics, in an order that differs from run to run.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from megatron_lite.ops.arguments import Documents, ProbabilityDropout
from megatron_lite.ops.backends import Needs, lacks_package

MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
_INSTALL = {
    2: "pip install flash-attn --no-build-isolation",
    3: "from the folder hopper of github.com/Dao-AILab/flash-attention, PyPI's flash_attn_3 being empty",
    4: "pip install flash-attn-4",
}


def lacks(group: str, needs: Needs, version: int) -> Iterator[str]:
    blackwell = needs.capability is not None and needs.capability >= (10, 0)
    reasons = [
        *needs.lacks_gpu((8, 0) if version == 2 else (9, 0), (10, 0) if version == 3 else None),
        *needs.lacks_tensor_cores(),
        *needs.lacks_head_dim(128 if version == 4 and blackwell else 256, 8),
        *needs.lacks_own_dropout(),
        *needs.lacks_runs(),
    ]
    yield from reasons
    yield from lacks_package(
        MODULES[version], "flash_attn_varlen_func", _INSTALL[version], importing=not reasons
    )


def load(group: str, version: int) -> dict[str, Callable[..., Tensor]]:
    package = importlib.import_module(MODULES[version])

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        documents: Documents | None = None,
        dropout: ProbabilityDropout | None = None,
    ) -> Tensor:
        """The same function as `reference.attention`, without dropout; causal is from the last key in all versions."""
        assert dropout is None, "a run with attention dropout does not get this backend"
        options: dict[str, Any] = {"softmax_scale": 1 / math.sqrt(q.size(-1)), "causal": True}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, s, heads, d]
        if documents is None:
            return _output(package.flash_attn_func(q, k, v, **options)).transpose(1, 2)
        runs = documents.runs
        out = package.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=runs.queries,
            cu_seqlens_k=runs.keys,
            max_seqlen_q=runs.longest_queries,
            max_seqlen_k=runs.longest_keys,
            **options,
        )
        return _output(out).unflatten(0, q.shape[:2]).transpose(1, 2)

    return {"attention": attention}


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Version 4, and 3 in its first releases, give the log-sum-exp, too."""
    return result[0] if isinstance(result, tuple) else result
