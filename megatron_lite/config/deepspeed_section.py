"""The deepspeed section: DeepSpeed's own JSON, passed through, checked, and completed with what we derive.

DeepSpeed ignores top-level keys that it does not know, so they are checked here. What other keys of the tree
already say (batch sizes, precision, clipping, optimizer) may be repeated, but not contradicted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .deepspeed_keys import NESTED_KEYS, REMOVED_KEYS, REMOVED_ZERO_KEYS, TOP_LEVEL_KEYS, ZERO_KEYS
from .errors import Problem, unknown_key

if TYPE_CHECKING:
    from .tree import Config

Tree = dict[str, Any]

# Sections that would do again what is done here, or that cannot work with it: key -> why, and what to do.
REFUSED_KEYS = {
    "activation_checkpointing": "is not used here; remove it and set train.recompute",
    "tensor_parallel": "is not used here; remove it and set parallel.tensor",
    "sequence_parallel_size": "is not used here; remove it and set parallel.sequence_parallel",
    "autotuning": "starts jobs of its own, with settings that are not checked here; remove it and try "
    "train.micro_batch_size, train.recompute and the ZeRO stage with --set",
    "data_efficiency": "draws and shortens samples by itself, and here the data loader decides; remove it and "
    "set data.order and model.seq_length",
    "elasticity": "was removed from DeepSpeed; remove it: a run goes on from its checkpoint on any number of "
    "ranks",
    "hybrid_engine": "is for training and generating in one job; remove it and use tools/generate.py",
}
_MASTERS = (
    "needs DeepSpeed's own CPU optimizer; remove it and, for memory, set zero_optimization.offload_optimizer"
)
_NVME = '"nvme" swaps tensors out of the reach of our checkpoints; nearest: "cpu"'
# Values that cannot work here: path -> (those that can, why no other and what to do).
REFUSED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "bf16.bf16_master_weights_and_grads": ((False,), _MASTERS),
    "bf16.bf16_optimizer_states": ((False,), _MASTERS),
    "fp16.fp16_master_weights_and_grads": ((False,), _MASTERS),
    "pipeline.activation_checkpoint_interval": (
        (0,),
        "recomputes a second time, and ends in an error of the backward pass; remove it and set "
        "train.recompute",
    ),
    "pipeline.partition": (("best",), "is not used here; remove it and set parallel.pipeline_partition"),
    "pipeline.seed_layers": ((False,), "is not used here: train.seed says how layers begin; remove it"),
    "pipeline.stages": ((), "is not used here; remove it and set parallel.pipeline"),
    "zero_optimization.elastic_checkpoint": (
        (False,),
        "is for DeepSpeed's own checkpoints; remove it: ours load on any number of ranks",
    ),
    "zero_optimization.offload_optimizer.device": (("cpu", "none"), _NVME),
    "zero_optimization.offload_optimizer.ratio": (
        (1,),
        "must be 1: less keeps a part of the optimizer on the GPU, which needs DeepSpeed's own CPU optimizer, not "
        "the one that checkpoints are made of; nearest: 1",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        (False,),
        "replaces the optimizer that checkpoints are made of; remove it: offload_optimizer works without it",
    ),
    "zero_optimization.offload_param.device": (("cpu", "none"), _NVME),
    "zero_optimization.zenflow": (
        (),
        "replaces the optimizer that checkpoints are made of; remove it and set "
        "zero_optimization.offload_optimizer",
    ),
    "zero_optimization.zero_hpz_partition_size": (
        (0, 1),
        "more than 1 gathers weights from the neighbouring ranks, also where those hold other shards of "
        "parallel.tensor, and the loss is wrong; nearest: 1",
    ),
}
_OBJECTS = ("bf16", "bfloat16", "data_types", "fp16", "optimizer", "pipeline", "scheduler", "torch_autocast")
_SCHEDULERS = {"cosine": "WarmupCosineLR", "linear": "WarmupDecayLR", "constant": "WarmupLR"}


def check_keys(section: Tree) -> Iterator[Problem]:
    """Problems that need nothing but the section: unknown or removed keys, ZeRO values of a wrong type."""
    for key in section:
        path = f"deepspeed.{key}"
        if key in REFUSED_KEYS:
            yield Problem(path, REFUSED_KEYS[key])
        elif key in REMOVED_KEYS:
            yield Problem(path, "was removed from DeepSpeed; remove it")
        elif key not in TOP_LEVEL_KEYS:
            yield unknown_key(path, TOP_LEVEL_KEYS - REFUSED_KEYS.keys())
    for key in _OBJECTS:
        value = section.get(key)
        if value is None or isinstance(value, dict):
            yield from _check_nested(key, value)
        else:
            yield Problem(f"deepspeed.{key}", f"must be an object, not {json.dumps(value)}")
    zero = section.get("zero_optimization")
    if zero is None:
        return
    if not isinstance(zero, dict):
        yield Problem(
            "deepspeed.zero_optimization", f'must be an object such as {{"stage": 1}}, not {json.dumps(zero)}'
        )
        return
    for key, value in zero.items():
        yield from _check_zero_key(key, value)


def _check_nested(path: str, value: Tree | None) -> Iterator[Problem]:
    known = NESTED_KEYS.get(path)
    for key, inner in (value or {}).items():
        if known is not None and key not in known:
            yield unknown_key(f"deepspeed.{path}.{key}", known)
        else:
            yield from _check_value(f"{path}.{key}", inner)


def _check_value(path: str, value: Any) -> Iterator[Problem]:
    fine, why = REFUSED_VALUES.get(path, ((value,), ""))
    if value not in (None, "auto", *fine):
        yield Problem(f"deepspeed.{path}", why)


def _check_zero_key(key: str, value: Any) -> Iterator[Problem]:
    path = f"deepspeed.zero_optimization.{key}"
    known = ZERO_KEYS.get(key) or ZERO_KEYS.get(f"stage3_{key}")  # DeepSpeed takes both names
    if key in REMOVED_ZERO_KEYS:
        yield Problem(path, "was removed from DeepSpeed; remove it")
    elif known is None:
        yield unknown_key(path, ZERO_KEYS)
    elif value is None:
        return
    elif key == "stage":
        if isinstance(value, bool) or value not in (0, 1, 2, 3):
            yield Problem(path, f"must be 0, 1, 2 or 3, not {json.dumps(value)}")
    elif value != "auto" and not _matches(value, known):
        yield Problem(path, f"must be {known}, not {json.dumps(value)}")
    else:
        yield from _check_value(f"zero_optimization.{key}", value)
        if isinstance(value, dict):
            yield from _check_nested(f"zero_optimization.{key}", value)


def _matches(value: Any, known: str) -> bool:
    if known == "an object":
        return isinstance(value, dict)
    if known == "true or false":
        return isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)


def derived(config: Config) -> dict[str, tuple[str, Any]]:
    """What our keys say in DeepSpeed's words: path in DeepSpeed's JSON -> (our key, value)."""
    train = config.train
    return {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_clipping": ("optimizer.grad_clip", config.optimizer.grad_clip),
        "bf16.enabled": ("train.precision", train.precision == "bf16"),
        "fp16.enabled": ("train.precision", train.precision == "fp16"),
    }


def _repeated(config: Config) -> dict[str, tuple[str, Any]]:
    """What a DeepSpeed JSON may repeat, though it is not passed on: the loop does these itself."""
    optimizer = config.optimizer
    return {
        "bfloat16.enabled": ("train.precision", config.train.precision == "bf16"),
        "torch_autocast.enabled": ("train.precision", False),
        "steps_per_print": ("logging.interval", config.logging.interval),
        "optimizer.type": ("the optimizer section", "AdamW"),
        "optimizer.params.lr": ("optimizer.lr", optimizer.lr),
        "optimizer.params.betas": ("optimizer.beta1 and beta2", [optimizer.beta1, optimizer.beta2]),
        "optimizer.params.eps": ("optimizer.eps", optimizer.eps),
        "optimizer.params.weight_decay": ("optimizer.weight_decay", optimizer.weight_decay),
        "optimizer.params.torch_adam": ("the optimizer section", True),
        "optimizer.params.fused": ("the optimizer section", True),
        "optimizer.params.adam_w_mode": ("the optimizer section", True),
        "scheduler.type": ("optimizer.schedule", _SCHEDULERS.get(optimizer.schedule, optimizer.schedule)),
        "scheduler.params.warmup_num_steps": ("optimizer.warmup_steps", optimizer.warmup_steps),
        "scheduler.params.total_num_steps": ("optimizer.decay_steps", config.decay_steps),
        "scheduler.params.warmup_min_lr": ("the warmup, which starts at 0", 0),
        "scheduler.params.warmup_max_lr": ("optimizer.lr", optimizer.lr),
        "scheduler.params.warmup_type": ("the warmup", "linear"),
        "scheduler.params.warmup_min_ratio": ("the warmup, which starts at 0", 0),
        "scheduler.params.cos_min_ratio": ("optimizer.min_lr / lr", optimizer.min_lr / optimizer.lr),
    }


def check_values(config: Config) -> Iterator[Problem]:
    """Contradictions between the section and the rest of the tree; values that are known to train wrongly."""
    ours = derived(config) | _repeated(config)
    for path, value in _leaves(config.deepspeed):
        if path in ours:
            yield from _compare(path, value, *ours[path])
        elif path.startswith(("optimizer.", "scheduler.")):
            yield Problem(
                f"deepspeed.{path}", "is not used: the optimizer section sets all of this; remove it"
            )
    yield from _check_traps(config)


def check_accumulation(config: Config, steps: int, world_size: int) -> Iterator[Problem]:
    """The one derived value that needs the number of ranks."""
    given = config.deepspeed.get("gradient_accumulation_steps", "auto")
    owner = f"train.global_batch_size on {world_size} ranks"
    yield from _compare("gradient_accumulation_steps", given, owner, steps)


def _compare(path: str, value: Any, owner: str, wanted: Any) -> Iterator[Problem]:
    if value == "auto" or (value == wanted and isinstance(value, bool) == isinstance(wanted, bool)):
        return
    said = f"{json.dumps(value)} contradicts {owner}, which says {json.dumps(wanted)}"
    yield Problem(f"deepspeed.{path}", f"{said}; remove it here, or make the two equal")


def _check_traps(config: Config) -> Iterator[Problem]:
    section = config.deepspeed
    zero, pipeline = section.get("zero_optimization", {}), section.get("pipeline", {})
    if zero.get("round_robin_gradients") is True:
        yield Problem(
            "deepspeed.zero_optimization.round_robin_gradients",
            "true makes checkpoints silently wrong (it reorders the fp32 weights); nearest: false",
        )
    if zero.get("compute_grad_norm") is False:
        yield Problem(
            "deepspeed.zero_optimization.compute_grad_norm",
            "false leaves clipping and the reported grad_norm without a norm; nearest: true",
        )
    for key in ("pipe_partitioned", "grad_partitioned"):
        if pipeline.get(key) is True and config.parallel.tensor > 1:
            yield Problem(
                f"deepspeed.pipeline.{key}",
                "true with parallel.tensor > 1 breaks changing shapes and is slower; nearest: false",
            )
    if section.get("gradient_allreduce_op", "mean") not in ("mean", "auto"):
        yield Problem(
            "deepspeed.gradient_allreduce_op", "makes the loss depend on the number of ranks; nearest: mean"
        )
    accumulate = section.get("data_types", {}).get("grad_accum_dtype")
    if config.zero_stage == 0 and accumulate not in (None, "auto", config.train.precision):
        yield Problem(
            "deepspeed.data_types.grad_accum_dtype",
            f"without ZeRO gradients accumulate in train.precision; nearest: "
            f"{json.dumps(config.train.precision)}, or zero_optimization.stage = 1",
        )


def complete(config: Config, world_size: int) -> Tree:
    """The JSON that `deepspeed.initialize` is given: safe defaults, the user's section, and what we derive.

    Raises ConfigError when the batch sizes do not fit `world_size`.
    """
    result: Tree = {
        "zero_optimization": {"stage": 1, "memory_efficient_linear": False},
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.train.precision == "bf16" and config.zero_stage > 0:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.deepspeed.get("zero_optimization", {}).get("offload_optimizer"):
        result["zero_force_ds_cpu_optimizer"] = False  # the optimizer is ours, and DeepSpeed would refuse it
    _overlay(result, config.deepspeed)
    for key in ("bfloat16", "optimizer", "scheduler", "steps_per_print", "torch_autocast"):
        result.pop(key, None)
    result["gradient_accumulation_steps"] = config.accumulation_steps(world_size)
    for path, (_, value) in derived(config).items():
        section, _, key = path.rpartition(".")
        (result.setdefault(section, {}) if section else result)[key] = value
    return result


def _overlay(base: Tree, extra: Tree) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _overlay(base[key], value)
        elif value != "auto":
            base[key] = copy.deepcopy(value)


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
