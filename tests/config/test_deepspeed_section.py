"""The deepspeed section: its keys against the installed DeepSpeed, contradictions, traps, the final JSON."""

import json
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config import Config, ConfigError, load_config
from megatron_lite.config.deepspeed_keys import (
    NESTED_KEYS,
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
)
from megatron_lite.config.deepspeed_section import REFUSED_KEYS, REFUSED_VALUES


def problems(small: Path, section: dict[str, Any], *overrides: str) -> list[str]:
    try:
        load_config(small, [f"deepspeed={json.dumps(section)}", *overrides])
    except ConfigError as error:
        return [line.strip().removeprefix("deepspeed.") for line in str(error).splitlines()[1:]]
    return []


class Asked(dict[str, Any]):
    """A dict that notes which keys are looked up in it."""

    seen: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return AskedKeys(self)


class AskedKeys(KeysView[str]):
    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __contains__(self, key: object) -> bool:
        return key in self.asked

    def __iter__(self) -> Iterator[str]:
        return iter(self.asked)

    def __len__(self) -> int:
        return len(self.asked)


def test_embedded_keys_are_the_installed_deepspeeds() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked = Asked(train_batch_size=1)
    asked.seen = Asked.seen = set()  # DeepSpeed copies the dict, and the copy must note into the same set
    DeepSpeedConfig(asked)
    only_under_a_launcher = {"sequence_parallel_size"}
    assert asked.seen | only_under_a_launcher == TOP_LEVEL_KEYS | REMOVED_KEYS
    assert set(_REMOVED_ZERO_CONFIG_KEYS) == REMOVED_ZERO_KEYS

    fields = DeepSpeedZeroConfig.model_fields
    assert {field.alias or name for name, field in fields.items()} == set(ZERO_KEYS)
    for name, field in fields.items():
        kind = ZERO_KEYS[field.alias or name]
        assert (bool in _types(field.annotation)) == (kind == "true or false"), name
        if name != "stage":
            assert (int in _types(field.annotation)) == (kind == "a whole number"), name


def test_embedded_nested_keys_are_the_installed_deepspeeds() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import get_pipeline_config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import offload_config

    data_types = [constants.GRAD_ACCUM_DTYPE, constants.PARAM_DTYPE, constants.BUFFER_DTYPE]
    offload_param = offload_config.DeepSpeedZeroOffloadParamConfig
    offload_optimizer = offload_config.DeepSpeedZeroOffloadOptimizerConfig
    assert {key: set(known) for key, known in NESTED_KEYS.items()} == {
        "bf16": set(DeepSpeedBF16Config.model_fields),
        "bfloat16": set(DeepSpeedBF16Config.model_fields),
        "fp16": set(DeepSpeedFP16Config.model_fields),
        "pipeline": {*get_pipeline_config({}), "use_reentrant"},
        "data_types": {*data_types, constants.KEEP_IN_FP32_MODULES},
        "zero_optimization.offload_param": set(offload_param.model_fields),
        "zero_optimization.offload_optimizer": set(offload_optimizer.model_fields),
    }


def _types(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *getattr(annotation, "__args__", ()))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"gradient_cliping": 1.0},
            "gradient_cliping: unknown key; did you mean deepspeed.gradient_clipping?",
        ),
        ({"zero_optimization": {"stge": 1}}, "zero_optimization.stge: unknown key; did you mean "),
        ({"amp": {}}, "amp: was removed from DeepSpeed; remove it"),
        (
            {"zero_optimization": {"mics_shard_size": 2}},
            "zero_optimization.mics_shard_size: was removed from DeepSpeed",
        ),
        ({"zero_optimization": True}, 'zero_optimization: must be an object such as {"stage": 1}, not true'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be 0, 1, 2 or 3, not 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: must be 0, 1, 2 or 3, not true"),
        (
            {"zero_optimization": {"stage": "auto"}},
            'zero_optimization.stage: must be 0, 1, 2 or 3, not "auto"',
        ),
        ({"zero_optimization": {"stage": [1]}}, "zero_optimization.stage: must be 0, 1, 2 or 3, not [1]"),
        (
            {"zero_optimization": {"overlap_comm": 1}},
            "zero_optimization.overlap_comm: must be true or false, not 1",
        ),
        (
            {"zero_optimization": {"sub_group_size": 0.5}},
            "zero_optimization.sub_group_size: must be a whole number, not 0.5",
        ),
        (
            {"zero_optimization": {"offload_param": True}},
            "zero_optimization.offload_param: must be an object, not true",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable: unknown key; did you mean deepspeed.bf16.enabled?"),
        (
            {"pipeline": {"pipe_partition": True}},
            "pipeline.pipe_partition: unknown key; did you mean deepspeed.pipe",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key; did you mean "
            "deepspeed.zero_optimization.off",
        ),
        ({"bf16": True}, "bf16: must be an object, not true"),
        ({"autotuning": {"enabled": True}}, "autotuning: starts jobs of its own"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency: draws and shortens samples by itself"),
        (
            {"elasticity": {"enabled": True}},
            "elasticity: was removed from DeepSpeed; remove it: a run goes on",
        ),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine: is for training and generating in one job"),
        ({"pipeline": 2}, "pipeline: must be an object, not 2"),
        (
            {"activation_checkpointing": {}},
            "activation_checkpointing: is not used here; remove it and set train.",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel: is not used here; remove it and set parallel.",
        ),
        (
            {"train_batch_size": 32},
            "train_batch_size: 32 contradicts train.global_batch_size, which says 16;",
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu: 1 contradicts train.micro_batch_",
        ),
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping: 0.5 contradicts optimizer.grad_clip, which says 1.0;",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled: true contradicts train.precision, which says false;"),
        ({"bfloat16": {"enabled": True}}, "bfloat16.enabled: true contradicts train.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: true contradicts train.precision, which says false;"),
        ({"fp16": {"enabled": 0}}, "fp16.enabled: 0 contradicts train.precision, which says false;"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled: true contradicts train.precision"),
        ({"steps_per_print": 10}, "steps_per_print: 10 contradicts logging.interval, which says 1;"),
        (
            {"optimizer": {"type": "Lion"}},
            'optimizer.type: "Lion" contradicts the optimizer section, which says "A',
        ),
        (
            {"optimizer": {"params": {"lr": 1}}},
            "optimizer.params.lr: 1 contradicts optimizer.lr, which says 0.001;",
        ),
        ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad: is not used"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type: "),
        (
            {"scheduler": {"params": {"warmup_num_steps": 5}}},
            "scheduler.params.warmup_num_steps: 5 contradicts opt",
        ),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients: true makes checkpoints silently wrong",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm: false leaves clipping",
        ),
        (
            {"gradient_allreduce_op": "sum"},
            "gradient_allreduce_op: makes the loss depend on the number of ranks",
        ),
        (
            {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}},
            "data_types.grad_accum_dtype: without ZeRO gradients accumulate in train.precision; "
            'nearest: "fp32"',
        ),
    ],
)
def test_one_problem(small: Path, section: dict[str, Any], message: str) -> None:
    found = problems(small, section)
    assert len(found) == 1 and found[0].startswith(message), found


UNUSABLE: list[tuple[str, Any, str]] = [
    ("bf16.bf16_master_weights_and_grads", True, "zero_optimization.offload_optimizer"),
    ("bf16.bf16_optimizer_states", True, "zero_optimization.offload_optimizer"),
    ("fp16.fp16_master_weights_and_grads", True, "zero_optimization.offload_optimizer"),
    ("pipeline.activation_checkpoint_interval", 1, "set train.recompute"),
    ("pipeline.partition", "uniform", "set parallel.pipeline_partition"),
    ("pipeline.seed_layers", True, "train.seed"),
    ("pipeline.stages", 2, "set parallel.pipeline"),
    ("zero_optimization.elastic_checkpoint", True, "ours load on any number of ranks"),
    ("zero_optimization.offload_optimizer.device", "nvme", 'nearest: "cpu"'),
    ("zero_optimization.offload_optimizer.ratio", 0.5, "nearest: 1"),
    ("zero_optimization.offload_optimizer.ratio", "x", "nearest: 1"),
    ("zero_optimization.offload_optimizer.super_offload", True, "works without it"),
    ("zero_optimization.offload_param.device", "nvme", 'nearest: "cpu"'),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "set zero_optimization.offload_optimizer"),
    ("zero_optimization.zero_hpz_partition_size", 8, "nearest: 1"),
]


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(("path", "value", "remedy"), UNUSABLE, ids=[path for path, *_ in UNUSABLE])
def test_what_cannot_work_is_refused_and_its_harmless_values_are_not(
    small: Path, path: str, value: Any, remedy: str
) -> None:
    (found,) = problems(small, nested(path, value))
    assert found.startswith(f"{path}: ") and remedy in found
    for harmless in ("auto", *REFUSED_VALUES[path][0]):
        assert problems(small, nested(path, harmless)) == []


def test_every_value_that_is_refused_is_tested_and_known() -> None:
    assert {path for path, *_ in UNUSABLE} == REFUSED_VALUES.keys()
    known = {f"{section}.{key}" for section, keys in NESTED_KEYS.items() for key in keys}
    assert REFUSED_VALUES.keys() <= known | {f"zero_optimization.{key}" for key in ZERO_KEYS}
    assert REFUSED_KEYS.keys() <= TOP_LEVEL_KEYS | REMOVED_KEYS


def test_partitioned_pipeline_activations_are_refused_with_tensor_parallelism(small: Path) -> None:
    section = {"pipeline": {"pipe_partitioned": True, "grad_partitioned": True}}
    assert problems(small, section) == []
    assert [line.partition(":")[0] for line in problems(small, section, "parallel.tensor=2")] == [
        "pipeline.pipe_partitioned",
        "pipeline.grad_partitioned",
    ]


def test_values_that_agree_or_are_auto(small: Path) -> None:
    section = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1,
        "steps_per_print": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto", "loss_scale_window": 500},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto"}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 0, "total_num_steps": 20}},
        "zero_optimization": {"stage": 3, "prefetch_bucket_size": 5e7, "stage3_max_live_parameters": "auto"},
        "wall_clock_breakdown": True,
    }
    assert problems(small, section, "train.precision=bf16") == []
    config = load_config(small, [f"deepspeed={json.dumps(section)}", "train.precision=bf16"])
    result = config.deepspeed_dict(2)
    assert not {"optimizer", "scheduler", "steps_per_print"} & result.keys()
    assert result["wall_clock_breakdown"] is True
    assert result["fp16"] == {"enabled": False, "loss_scale_window": 500}
    assert result["zero_optimization"] == {
        "stage": 3,
        "memory_efficient_linear": False,
        "prefetch_bucket_size": 5e7,
    }


def test_accumulation_must_agree_with_the_ranks(small: Path) -> None:
    config = load_config(small, ["deepspeed.gradient_accumulation_steps=4"])
    config.check_world(2)
    with pytest.raises(
        ConfigError, match=r"accumulation_steps: 4 contradicts train.global_batch_size on 4 ranks"
    ):
        config.check_world(4)


def final(small: Path, *overrides: str, world: int = 1) -> tuple[Config, dict[str, Any]]:
    config = load_config(small, overrides)
    return config, config.deepspeed_dict(world)


def test_final_json(small: Path) -> None:
    _, result = final(small, "parallel.tensor=2", "parallel.pipeline=2", world=8)
    assert result == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 1, "memory_efficient_linear": False},
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


def test_bf16_accumulates_in_fp32_wherever_deepspeed_can(small: Path) -> None:
    for stage in (1, 2, 3):
        _, result = final(small, "train.precision=bf16", f"deepspeed.zero_optimization.stage={stage}")
        assert result["data_types"] == {"grad_accum_dtype": "fp32"} and result["bf16"] == {"enabled": True}
    # without ZeRO DeepSpeed raises NotImplementedError for any other type than the model's
    _, result = final(small, "train.precision=bf16", "deepspeed.zero_optimization.stage=0")
    assert "data_types" not in result


def test_offload_keeps_our_optimizer(small: Path) -> None:
    _, result = final(small, "deepspeed.zero_optimization.offload_optimizer.device=cpu")
    assert result["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in final(small)[1]


def test_the_configuration_is_not_changed_by_what_is_made_of_it(small: Path) -> None:
    config, result = final(small, "deepspeed.fp16.hysteresis=3")
    result["fp16"]["hysteresis"] = 4
    assert config.deepspeed == {"fp16": {"hysteresis": 3}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_reads_the_final_json(small: Path, stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    _, result = final(small, f"deepspeed.zero_optimization.stage={stage}", "optimizer.grad_clip=0.5")
    read = DeepSpeedConfig(result)
    assert read.zero_optimization_stage == stage and read.zero_config.memory_efficient_linear is False
    assert (read.train_batch_size, read.gradient_accumulation_steps, read.gradient_clipping) == (16, 8, 0.5)
    assert read.pipeline["pipe_partitioned"] is False and read.pipeline["grad_partitioned"] is False
    assert read.steps_per_print is None
