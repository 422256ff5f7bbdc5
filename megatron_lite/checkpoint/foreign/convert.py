"""Checkpoints of Megatron-LM and DeepSpeed as ours; one parameter in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import Deferred
from megatron_lite.checkpoint.foreign import names
from megatron_lite.checkpoint.foreign.arguments import model_of
from megatron_lite.checkpoint.foreign.torch_dist import METADATA, TorchDist
from megatron_lite.checkpoint.foreign.universal import FOLDER, Universal
from megatron_lite.checkpoint.layout import KINDS, Piece
from megatron_lite.checkpoint.starting import save_import, starting_config
from megatron_lite.config import Config, ModelConfig, build_config
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.parameter import spec_of

_TRACKER = "latest_checkpointed_iteration.txt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Attributes:
        folder: the step folder.
        lost: why there is no optimizer state; None where there is.
    """

    folder: Path
    model: ModelConfig
    step: int
    lost: str | None


def find_foreign(path: Path) -> Path | None:
    """The folder of a checkpoint of another system that `path` names, None where it names none.

    Raises:
        CheckpointError: it is of a form that cannot be read without the system that wrote it; says what to do there.
    """
    if (tracker := path / _TRACKER).is_file():
        step = tracker.read_text().strip()
        path = path / (f"iter_{int(step):07d}" if step.isdigit() else step)
    for pointer in ("latest_universal", "latest"):
        if (path / pointer).is_file() and (path / (path / pointer).read_text().strip() / FOLDER).is_dir():
            return path / (path / pointer).read_text().strip()
    if (path / METADATA).is_file() or (path / FOLDER).is_dir():
        return path
    for pattern, reason in _REFUSALS.items():
        if next(path.glob(pattern), None) is not None:
            raise CheckpointError(f"{path} {reason}")
    return None


_REFUSALS = {
    "mp_rank_*/model_optim_rng.pt": "is in Megatron-LM's old format, whose files only unpickling its code reads: "
    "load it there and save it with --ckpt-format torch_dist",
    "*/.zarray": "is in Megatron-LM's zarr format: load it there and save it with --ckpt-format torch_dist",
    "*_optim_states.pt": "is in DeepSpeed's own format, which only the layout that wrote it reads: make it universal "
    "with `python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR --output_folder NEW`",
    "*/*_optim_states.pt": "holds checkpoints in DeepSpeed's own format, which only the layout that wrote them reads: "
    "make one universal with `python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR --output_folder NEW`",
}


def import_foreign(
    source: Path, target: Path, *, config: Config | None = None, weights_only: bool = False
) -> Imported:
    """Write what `find_foreign` found as a checkpoint of the same step under `target`/checkpoints.

    With fp32 weights and moments where the source has both for every parameter, in shapes that are those of the
    weights. Rows of the vocabulary's padding are kept as far as ours has them, and zero beyond.

    Args:
        config: of the model, where the source does not say how it is made. Without one `target`/config.json is written,
            for a run that begins with what was imported: only the data and their tokenizer are missing.

    Raises:
        CheckpointError: the model is not one of ours, a parameter is missing, too many or of another shape, a file
            is damaged, or `target` holds a checkpoint or a config.json already.
    """
    opened = Universal(source) if (source / FOLDER).is_dir() else TorchDist(source)
    theirs = names.ours(opened.names())
    if "embed.weight" not in theirs:
        raise CheckpointError(f"{source}: no parameter is the embedding; is it a GPT of Megatron?")
    args = _arguments(opened.common)
    if config is not None:
        model = config.model
    elif args:
        model = model_of(args, _rows(opened, theirs["embed.weight"], args))
    else:
        raise CheckpointError(f"{source} does not say how its model is made; give that with --config FILE")
    plan = _plan(model, opened, theirs, args)
    lost = "as asked for" if weights_only else _why_no_state(opened, theirs)
    kinds = ("weight",) if lost else KINDS
    pieces = [_piece(rule, kind, opened, master=not lost) for rule in plan for kind in kinds]
    step = int(opened.common.get("iteration") or opened.common.get("global_steps") or 0)
    tree = None
    if config is None:
        precision = "bf16" if args.get("bf16") else "fp16" if args.get("fp16") else "fp32"
        tree = starting_config(source, target, model, precision=precision, step=None if lost else step)
        config = build_config(tree, str(source))
    samples = int(args.get("consumed_train_samples") or 0)
    tokens = int(args.get("consumed_train_tokens") or samples * model.seq_length)
    metadata = {
        "config": config.model_dump(mode="json"),
        "progress": {"step": step, "consumed_samples": samples, "consumed_tokens": tokens, "data": None},
        "engine": {"optimizer_steps": _optimizer_steps(opened, step), "loss_scaler": {}},
        "imported_from": str(source),
    }
    return Imported(save_import(target, step, pieces, metadata, tree), model, step, lost)


def _arguments(common: dict[str, Any]) -> dict[str, Any]:
    args = common.get("args")
    return dict(args) if isinstance(args, dict) else dict(getattr(args, "__dict__", {}))


def _rows(opened: TorchDist | Universal, name: str, args: dict[str, Any]) -> int:
    """Rows of the embedding."""
    hidden = args.get("hidden_size") or 1
    rows: int = math.prod(opened.shape(name)) // hidden  # ZeRO-3's are flat
    return rows


def _optimizer_steps(opened: TorchDist | Universal, step: int) -> int:
    """Adam's count of steps, which differs from the run's where steps were skipped."""
    if isinstance(opened, Universal):
        return opened.optimizer_steps() or step
    optimizer = opened.common.get("optimizer")
    while isinstance(optimizer, dict) and isinstance(optimizer.get("optimizer"), dict):
        optimizer = optimizer["optimizer"]
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    counts = [
        group["step"]
        for group in groups or []
        if isinstance(group, dict) and isinstance(group.get("step"), int)
    ]
    return max(counts, default=step)


def _why_no_state(opened: TorchDist | Universal, theirs: dict[str, str]) -> str | None:
    """Why the optimizer state is not imported; None where all of it is there."""
    for kind in _MOMENTS:
        held = set(opened.names(kind)) if kind in opened.kinds else set()
        if absent := [name for name in theirs.values() if name not in held]:
            fault = f"{kind} of {absent[0]} ({len(absent)} of {len(theirs)} parameters) is not there"
            return f"{fault} as a tensor of its own"
    return None


@dataclass(frozen=True)
class _Rule:
    """One of our parameters, the tensor it is, and what is done to that on the way (elements, 1-D)."""

    name: str
    shape: tuple[int, ...]
    theirs: str
    change: Callable[[torch.Tensor], torch.Tensor]


def _plan(
    model: ModelConfig, opened: TorchDist | Universal, theirs: dict[str, str], args: dict[str, Any]
) -> list[_Rule]:
    specs = {
        spec.name: spec
        for spec in map(spec_of, GPT(model, Runtime(device=torch.device("meta"))).parameters())
    }
    if absent := sorted(specs.keys() - theirs.keys()):
        raise CheckpointError(
            f"{opened.folder}: {', '.join(absent[:3])} is missing ({len(absent)} parameters)"
        )
    left = theirs.keys() - specs.keys() - ({"head.weight"} if model.tie_embeddings else set())
    if left:
        listed = ", ".join(theirs[name] for name in sorted(left)[:3])
        raise CheckpointError(
            f"{opened.folder}: its settings make a model without {listed} ({len(left)} parameters)"
        )
    plan = []
    for name, spec in specs.items():
        stored = opened.shape(theirs[name])
        change: Callable[[torch.Tensor], torch.Tensor] = _unchanged
        if name in ("embed.weight", "head.weight"):
            change = _resized(math.prod(spec.global_shape))
            fits = math.prod(stored) % model.hidden_size == 0 and stored[-1] in (
                model.hidden_size,
                math.prod(stored),
            )
            fits = fits and math.prod(stored) // model.hidden_size >= (model.vocab_size or 0)
        else:
            fits = math.prod(stored) == math.prod(spec.global_shape)
            fits = fits and (len(stored) == 1 or stored[-1] == spec.global_shape[-1])
        if not fits:
            raise CheckpointError(
                f"{opened.folder}: {theirs[name]} is {stored}, its settings say {spec.global_shape}"
            )
        if ".linear_qkv." in name and "query_key_value" in theirs[name]:
            change = _ordered(model, float(opened.common.get("checkpoint_version", 3.0)))
        if ".linear_fc1." in name and isinstance(opened, Universal):
            _check_halves(opened, theirs[name], model, int(args.get("tensor_model_parallel_size") or 1))
        plan.append(_Rule(name, spec.global_shape, theirs[name], change))
    return plan


def _check_halves(opened: Universal, name: str, model: ModelConfig, ranks: int) -> None:
    """Raises CheckpointError for the gate and up of several tensor-parallel ranks, laid rank after rank."""
    if model.activation == "swiglu" and ranks > 1 and not opened.merged_in_halves(name):
        raise CheckpointError(
            f"{opened.folder}: {name} of {ranks} tensor-parallel ranks was not merged as gate and up, so its rows are "
            "mixed; convert it again with a newer Megatron-DeepSpeed"
        )


def _unchanged(flat: torch.Tensor) -> torch.Tensor:
    return flat


def _resized(numel: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of padding left out or added, as zeros."""

    def change(flat: torch.Tensor) -> torch.Tensor:
        return torch.cat([flat[:numel], flat.new_zeros(max(0, numel - flat.numel()))])

    return change


def _ordered(model: ModelConfig, version: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of queries, keys and values in the order of version 2: heads x (query, key, value) x channels.

    As Megatron-LM's fix_query_key_value_ordering: version 0 had (query, key, value) x heads x channels, and version 1
    heads x channels x (query, key, value).
    """
    if version >= 2:
        return _unchanged
    if model.query_groups != model.num_attention_heads:
        raise CheckpointError(f"checkpoints of version {version} have no grouped queries; its settings do")
    heads, width = model.num_attention_heads, model.head_dim

    def change(flat: torch.Tensor) -> torch.Tensor:
        if version == 0:
            return flat.view(3, heads, width, -1).transpose(0, 1).reshape(-1)
        return flat.view(heads, width, 3, -1).transpose(1, 2).reshape(-1)

    return change


def _piece(rule: _Rule, kind: str, opened: TorchDist | Universal, *, master: bool) -> Piece:
    stored = "master" if kind == "weight" and master and "master" in opened.kinds else kind
    numel = math.prod(rule.shape)

    def load() -> torch.Tensor:
        flat = rule.change(opened.read(rule.theirs, stored))
        return flat.float() if master else flat

    dtype = torch.float32 if master else opened.dtype(rule.theirs, stored)
    return Piece(rule.name, kind, rule.shape, None, 0, 0, 0, Deferred(dtype, (numel,), load))
