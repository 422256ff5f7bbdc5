"""Which part of the fp32 masters and Adam moments this rank owns, under every ZeRO stage.

DeepSpeed keeps them in flat buffers laid out differently by each of its optimizers; here they become pieces keyed
by what is true on every layout (name, tensor-parallel slice, flat range), and back.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint import Piece, Reader
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import ParameterSpec, spec_of
from megatron_lite.training.optimizer import WholeAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one parameter's shard, whose fp32 master lives on this rank.

    Attributes:
        flat_start: where it begins in the row-major flattened shard, in elements.
        owner: the tensor that the torch optimizer steps, and keys its state by.
        offset, numel: the part of the flattened owner that holds this fragment.
    """

    spec: ParameterSpec
    flat_start: int
    owner: Tensor
    offset: int
    numel: int

    def view(self, of: Tensor) -> Tensor:
        """The fragment's part of a tensor shaped like its owner, as a writable 1-D view."""
        return of.detach().view(-1).narrow(0, self.offset, self.numel)


def fragments(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, wrapper: Any
) -> list[Fragment]:
    """This rank's fragments of every parameter.

    Args:
        parameters: the model's parameters held by this rank.
        optimizer: the torch optimizer we gave to DeepSpeed (it now steps DeepSpeed's flat buffers).
        wrapper: DeepSpeed's optimizer around it; the same object for `WholeAdamW`.
    """
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return [f for p in parameters for f in _zero3(p, wrapper)]
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):  # ZeRO-0 in half precision
        masters = {
            id(low): high
            for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        return [Fragment(spec_of(p), 0, masters[id(p)], 0, p.numel()) for p in parameters]
    if isinstance(optimizer, WholeAdamW):
        return [Fragment(spec_of(p), 0, optimizer.masters[p], 0, p.numel()) for p in parameters]
    return [f for p in parameters for f in _zero12(p, optimizer)]


def _zero12(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        owner = optimizer.param_groups[mapping.param_group_index]["params"][0]
        shard, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(spec_of(parameter), shard.start, owner, flat.start, flat.numel)


def _zero3(parameter: Any, wrapper: Any) -> Iterator[Fragment]:
    group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start, numel = zero3_part(parameter)
    if numel:
        yield Fragment(spec_of(parameter), start, wrapper.fp32_partitioned_groups_flat[group], offset, numel)


def zero3_part(parameter: Any) -> tuple[int, int]:
    """Where this rank's part of a parameter begins under ZeRO-3, and its elements without the last part's padding.

    A parameter of fewer elements than ranks leaves some with none.
    """
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank(group=parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def pieces(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    wrapper: Any,
    mesh: Mesh,
    replicated: bool,
) -> Iterator[Piece]:
    """The pieces this rank writes: every element of the model is written by exactly one rank.

    What several ranks hold alike is divided among them evenly.

    Args:
        parameters: those of this rank that no other pipeline stage writes.
        optimizer, wrapper: as for `fragments`.
        replicated: every data-parallel rank holds everything (ZeRO-0).
    """
    data_rank, data_size = (mesh.data_rank, mesh.data_size) if replicated else (0, 1)
    specs = [spec_of(parameter) for parameter in parameters]
    turns = _turns([spec for spec in specs if spec.dim is not None], data_rank, data_size)
    rank, size = mesh.tensor_rank * data_size + data_rank, mesh.tensor_size * data_size
    turns |= _turns([spec for spec in specs if spec.dim is None], rank, size)
    for fragment in fragments(parameters, optimizer, wrapper):
        spec, first = fragment.spec, fragment.flat_start
        begin, end = (min(max(edge, first), first + fragment.numel) for edge in turns[spec.name])
        if begin == end:
            continue
        own = replace(fragment, flat_start=begin, offset=fragment.offset + begin - first, numel=end - begin)
        state = optimizer.state.get(own.owner, {})
        for kind in ("weight", *MOMENTS):
            if kind == "weight":
                data = own.view(own.owner)
            elif kind in state:
                data = own.view(state[kind])
            else:
                data = torch.zeros(own.numel)  # no optimizer step was taken yet
            yield Piece(
                name=spec.name,
                kind=kind,
                global_shape=spec.global_shape,
                dim=spec.dim,
                start=spec.start,
                stop=spec.stop,
                flat_start=own.flat_start,
                data=data,
            )


def _turns(specs: list[ParameterSpec], rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Of parameters that `size` ranks hold alike, the flat range of each that `rank` writes.

    Laid end to end they are cut into equal parts, so that at most one parameter is cut between two ranks.
    """
    numels = [math.prod(spec.shape) for spec in specs]
    total, found, at = sum(numels), {}, 0
    first, last = total * rank // size, total * (rank + 1) // size
    for spec, numel in zip(specs, numels, strict=True):
        found[spec.name] = (min(max(first - at, 0), numel), min(max(last - at, 0), numel))
        at += numel
    return found


Read = Callable[[], None]


def reads(
    parameters: list[nn.Parameter],
    owned: list[Fragment],
    optimizer: torch.optim.Optimizer,
    reader: Reader,
    optimizer_steps: int | None,
) -> dict[tuple[str, str], list[Read]]:
    """What fills this rank's masters and moments from a checkpoint of any layout, by the parameter's name and kind.

    A parameter that is its own master (fp32, nothing partitioned) is not among them. Where `optimizer_steps` is None
    there are no moments, nor those of before any more.
    """
    found: dict[tuple[str, str], list[Read]] = {}
    own_masters = {id(parameter) for parameter in parameters}
    if optimizer_steps is None:
        optimizer.state.clear()
    for fragment in owned:
        spec, owner, start = fragment.spec, fragment.owner, fragment.flat_start
        targets = {} if id(owner) in own_masters else {"weight": owner}
        if optimizer_steps is not None:
            state = optimizer.state[owner]
            for kind in MOMENTS:
                if kind not in state:  # the buffers do not exist before the first step
                    state[kind] = torch.zeros_like(owner)
            state["step"] = torch.tensor(float(optimizer_steps), device=owner.device)
            targets |= {kind: state[kind] for kind in MOMENTS}
        for kind, target in targets.items():
            read = partial(read_part, reader, fragment.view(target), spec, kind, start)
            found.setdefault((spec.name, kind), []).append(read)
    return found


def read_part(reader: Reader, out: Tensor, spec: ParameterSpec, kind: str, flat_start: int) -> None:
    """Fills `out`, 1-D, from element `flat_start` of this rank's shard on.

    Where the checkpoint pads the vocabulary to another size, rows of padding are left out or made zero: no token ever
    looks them up, and their gradient is zero.
    """
    repad = differs_in_padding(spec, reader.shape(spec.name))
    reader.read_into(out, spec.name, kind, spec.dim, spec.start, spec.stop, flat_start, zero_fill=repad)


def differs_in_padding(spec: ParameterSpec, shape: tuple[int, ...]) -> bool:
    """Whether a stored shape is the parameter's but for its number of rows, one for each token."""
    own = spec.global_shape
    return spec.name in ("embed.weight", "head.weight") and shape[0] != own[0] and shape[1:] == own[1:]


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Optimizer steps applied so far (skipped ones not counted); Adam's bias correction needs it."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
