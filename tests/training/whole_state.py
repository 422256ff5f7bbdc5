"""All that an engine holds, gathered from all ranks and put together by name: no pieces, no files, no reader.

Where DeepSpeed has each fragment is what `optimizer_state.fragments` says, which saving and loading go by too; that
the masters are there, the weights that the model computes with show.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.parameter import ParameterSpec, spec_of
from megatron_lite.training.engine import Engine
from megatron_lite.training.optimizer_state import MOMENTS, fragments
from megatron_lite.training.saving import gather

State = dict[tuple[str, str], Tensor]  # (name, kind) -> whole, fp32


def whole_state(engine: Engine) -> State:
    """Masters and moments, the same on every rank; what several ranks hold is checked to be alike.

    The weights that the model computes with, on every rank, are checked to be the masters in the training precision.
    """
    held = [
        (fragment.spec, kind, fragment.flat_start, fragment.view(data).clone())
        for fragment in fragments(
            list(engine.module.parameters()), engine.optimizer, engine.deepspeed.optimizer
        )
        for kind, data in _tensors(engine, fragment.owner).items()
    ]
    state: State = {}
    for rank, parts in enumerate(gather(held)):
        for spec, kind, start, data in parts:
            whole = state.setdefault((spec.name, kind), torch.full(spec.global_shape, math.nan))
            _put(whole, spec, start, data, f"{kind} of {spec.name} on rank {rank}")
    for key, whole in state.items():
        assert not whole.isnan().any(), f"{key}: no rank holds all of it"
    for parameter in engine.module.parameters():
        spec, own, start = spec_of(parameter), parameter.detach().reshape(-1), 0
        if hasattr(parameter, "ds_tensor"):
            start = parameter.ds_tensor.ds_numel * engine.mesh.data_rank
            own = parameter.ds_tensor.detach()[: max(0, parameter.ds_numel - start)]
            if parameter.ds_persist and parameter.numel():  # gathered, from the first step on
                whole = _shard(state[spec.name, "weight"], spec)
                assert torch.equal(parameter.detach(), whole.to(parameter.dtype)), (
                    f"{spec.name} is not its master"
                )
        master = _shard(state[spec.name, "weight"], spec).reshape(-1)[start : start + own.numel()]
        assert torch.equal(own, master.to(own.dtype)), f"{spec.name} is not its master"
    return state


def _tensors(engine: Engine, owner: Tensor) -> dict[str, Tensor]:
    return {"weight": owner} | {kind: engine.optimizer.state[owner][kind] for kind in MOMENTS}


def _shard(whole: Tensor, spec: ParameterSpec) -> Tensor:
    return whole if spec.dim is None else whole.narrow(spec.dim, spec.start, spec.stop - spec.start)


def _put(whole: Tensor, spec: ParameterSpec, start: int, data: Tensor, what: str) -> None:
    shard = _shard(whole, spec)
    flat = shard.reshape(-1)  # a copy, where tensor parallelism cuts rows
    part = flat[start : start + data.numel()]
    known = ~part.isnan()
    assert torch.equal(part[known], data[known]), f"{what} is not what another rank holds"
    part.copy_(data)
    shard.copy_(flat.view_as(shard))


def digest(state: State, rows: int | None = None) -> dict[str, str]:
    """SHA-256 of each part; of what is cut along the vocabulary, the first `rows` rows."""
    found = {}
    for (name, kind), whole in state.items():
        vocabulary = rows is not None and name in ("embed.weight", "head.weight")
        data = whole[:rows] if vocabulary else whole
        found[f"{name} {kind}"] = hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()
    return found


def summary(engine: Engine) -> dict[str, Any]:
    """Everything of a run's state that must not depend on the layout, but for its progress."""
    state = whole_state(engine)
    return {"engine": engine.state(), **digest(state, engine.config.model.vocab_size)}
