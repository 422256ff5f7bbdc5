"""Files, overrides and types: what load_config takes and how it says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_lite.config import CheckpointConfig, Config, ConfigError, build_config, load_config

Write = Callable[..., Path]
CHECKPOINT_KEYS = ", ".join(sorted(CheckpointConfig.model_fields))


def complaint(small: Path, *overrides: str, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(small, overrides, **kwargs)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_and_overrides(small: Path) -> None:
    config = load_config(
        small,
        [
            "data.train=runs/x_text_document",
            "deepspeed.zero_optimization.stage=2",
            "optimizer.lr=1",
            "train.steps=7",
        ],
    )
    assert config.data.train == "runs/x_text_document"
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    assert config.zero_stage == 2
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    assert config.train.steps == config.decay_steps == 7
    assert config.parallel.tensor == 1 and load_config(small).zero_stage == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a", "b"]', ("a", "b")),
        ('[[0.5, "a"], [2, "b"]]', ((0.5, "a"), (2.0, "b"))),
        ('"a=b"', "a=b"),
        ("a=b,c", "a=b,c"),
        ("null", None),
    ],
)
def test_override_values_are_json_or_plain_text(small: Path, text: str, expected: object) -> None:
    assert load_config(small, [f"data.train={text}"]).data.train == expected


def test_numbers_are_text_where_a_text_is_wanted(small: Path) -> None:
    config = load_config(
        small, ["data.split=1", "train.output_dir=2026", "data.train=7", "logging.wandb_project=true"]
    )
    assert (config.data.split, config.train.output_dir, config.data.train) == ("1", "2026", "7")
    assert config.logging.wandb_project == "true"


def test_null_clears(small: Path) -> None:
    cleared = [
        "model.kv_channels=8",
        "model.kv_channels=null",
        "deepspeed.fp16.enabled=true",
        "deepspeed.fp16=null",
    ]
    config = load_config(small, ["parallel.tensor=2", "parallel.tensor=null", *cleared])
    assert config.parallel.tensor == 1 and config.model.kv_channels is None and config.deepspeed == {}
    assert complaint(small, "train.steps=null") == [
        "train.steps: is required (optimizer steps of the whole run)",
    ]
    assert complaint(small, "parallel.tensr=null", "deepspeed.zero_optimzation=null") == [
        "deepspeed.zero_optimzation: unknown key; did you mean deepspeed.zero_optimization?",
        "parallel.tensr: unknown key; did you mean parallel.tensor?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensr=2", "parallel.tensr: unknown key; did you mean parallel.tensor?"),
        ("modle.x=2", "modle: unknown key; did you mean model?"),
        ("checkpoint.zzz=2", f"checkpoint.zzz: unknown key; checkpoint takes {CHECKPOINT_KEYS}"),
        ("train.steps=1.5", "train.steps: must be a whole number, not 1.5"),
        ("train.steps=20 # note", 'train.steps: must be a whole number, not "20 # note"'),
        ("train.seed=true", "train.seed: must be a whole number, not true"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel: must be true or false, not 1"),
        ("optimizer.lr=fast", 'optimizer.lr: must be a number, not "fast"'),
        ("optimizer.lr=NaN", "optimizer.lr: must be a finite number, not NaN"),
        ("model.hidden_size=-1", "model.hidden_size: must be more than 0, not -1"),
        ("model.hidden_dropout=1", "model.hidden_dropout: must be less than 1.0, not 1"),
        ("model.rotary_percent=2", "model.rotary_percent: must be at most 1.0, not 2"),
        ("optimizer.min_lr=-1", "optimizer.min_lr: must be at least 0.0, not -1"),
        ("data=5", "data: must be an object, not 5"),
        ("deepspeed=5", "deepspeed: must be an object, not 5"),
        ("train.output_dir=", 'train.output_dir: must be a text that is not empty, not ""'),
        ("data.split=[5]", "data.split: must be a text, not [5]"),
        ("parallel.pipeline_partition=5", "parallel.pipeline_partition: must be a list, not 5"),
        (
            'parallel.pipeline_partition=[1,"a"]',
            'parallel.pipeline_partition.1: must be a whole number, not "a"',
        ),
        (
            "data.train=[1, 2]",
            "data.train: must be a prefix, a list of prefixes or a list of [weight, prefix], not [1, 2]",
        ),
        (
            "train.precision=bf61",
            'train.precision: "bf61" is not one of fp32, bf16, fp16; did you mean bf16?',
        ),
        ("train.device=5", "train.device: 5 is not one of auto, cpu, cuda"),
        ("train.steps.x=4", "train.steps.x: train.steps is a value, it has no keys of its own"),
        ("train.steps", "--set train.steps: write it as KEY.PATH=VALUE, for example train.steps=100"),
    ],
)
def test_one_problem_one_line(small: Path, override: str, message: str) -> None:
    assert complaint(small, override) == [message]


def test_all_problems_are_reported_together(small: Path) -> None:
    found = complaint(
        small,
        "parallel.tensr=3",
        "train.steps=x",
        "model.hidden_size=65",
        "deepspeed.zero_optimization.stge=2",
        "optimizer.min_lr=1",
        world_size=3,
        check_files=True,
    )
    assert [line.partition(":")[0] for line in found] == [
        "deepspeed.zero_optimization.stge",
        "parallel.tensr",
        "train.steps",
        "model.hidden_size",
        "optimizer.min_lr",
        "data.train",
    ]


def test_no_problems_follow_from_a_key_that_is_itself_wrong(small: Path) -> None:
    """sequence_parallel needs tensor > 1, which is what was meant; the batch size follows from train."""
    assert len(complaint(small, "parallel.tensr=2", "parallel.sequence_parallel=true", world_size=6)) == 1
    assert len(complaint(small, "train.micro_batch_size=0", "train.global_batch_size=7", world_size=3)) == 1
    assert len(complaint(small, "model=null")) == 1 and len(complaint(small, "train=5", world_size=2)) == 1
    assert len(complaint(small, "deepspeed.zero_optimization=5", "parallel.pipeline=2")) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.normalization=layernorm", "LayerNorm"),
        ("model.normalization=rms_norm", "RMSNorm"),
        ("model.position_embedding=learned", "learned_absolute"),
        ("model.position_embedding=Rotary", "rope"),
        ("model.position_embedding=ROPE", "rope"),
        ("model.activation=gelu_new", "gelu_tanh"),
        ("train.precision=BFloat16", "bf16"),
        ("optimizer.schedule=WSD", "wsd"),
        ("logging.level=warn", "warning"),
    ],
)
def test_aliases(small: Path, override: str, expected: str) -> None:
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(small, [override]), section), key) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {\n  "a": 1,\n  }}', ":3:3: not valid JSON"),
        ('{"a": 1} // note', ":1:10: not valid JSON"),
        ("[1]", ": must hold one JSON object, not list"),
        (
            '{"model": {"a": 0, "seq_length": 1, "seq_length": 2}}',
            'not valid JSON: key "seq_length" appears twice',
        ),
    ],
)
def test_not_json(write: Write, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}" in str(caught.value) and message in str(caught.value)


def test_unreadable_files(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json: cannot be read: No such file"):
        load_config(tmp_path / "nothing.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"latin\.json: not UTF-8 text"):
        load_config(small, [], tmp_path / "latin.json")


def test_empty_tree_names_every_required_key(write: Write) -> None:
    assert complaint(write({})) == [
        "model: is required (shape and make-up of the transformer)",
        "train: is required (batch sizes, length and precision of the run)",
        "optimizer: is required (AdamW and the learning-rate schedule)",
    ]


def test_deepspeed_file_is_merged(small: Path, write: Write) -> None:
    extra = write({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, "ds.json")
    config = load_config(small, ["deepspeed.zero_optimization.overlap_comm=true"], extra)
    assert config.deepspeed["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 5e8,
        "overlap_comm": True,
    }


def test_auto_in_a_deepspeed_file_contradicts_nothing(tree: dict[str, Any], write: Write) -> None:
    main = write(tree | {"deepspeed": {"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}})
    extra = write({"zero_optimization": {"stage": "auto", "sub_group_size": 9}}, "ds.json")
    zero = load_config(main, [], extra).deepspeed["zero_optimization"]
    assert zero == {"stage": 2, "sub_group_size": 9}


def test_deepspeed_file_may_not_contradict(tree: dict[str, Any], write: Write) -> None:
    main = write(tree | {"deepspeed": {"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}})
    extra = write({"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}, "ds.json")
    flat = write({"zero_optimization": False}, "flat.json")
    assert complaint(main, deepspeed_config=flat) == [
        f'deepspeed.zero_optimization: is {{"stage": 1}} here and false in {flat}; remove one of the two'
    ]
    assert complaint(main, deepspeed_config=extra) == [
        f"deepspeed.zero_optimization.stage: is 1 here and 2 in {extra}; remove one of the two"
    ]


def test_tree_is_frozen_and_survives_json(small: Path) -> None:
    config = load_config(
        small, ['data.train=[[1, "a"]]', "parallel.pipeline=2", "parallel.pipeline_partition=[1,3]"]
    )
    with pytest.raises(ValidationError):
        config.train.steps = 5  # type: ignore[misc]
    assert build_config(json.loads(json.dumps(config.model_dump()))) == config
    assert build_config(config.resolved()).resolved() == config.resolved()
    assert config.resolved()["model"]["ffn_hidden_size"] == 256


def test_every_key_is_described() -> None:
    def undescribed(node: Any, path: str) -> list[str]:
        found = []
        for name, value in node.get("properties", {}).items():
            if not value.get("description"):
                found.append(f"{path}.{name}")
        return found

    schema = Config.model_json_schema()
    parts = {"Config": schema} | schema["$defs"]
    assert [key for name, part in parts.items() for key in undescribed(part, name)] == []
