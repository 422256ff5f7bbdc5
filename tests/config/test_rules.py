"""Rules between keys: each is broken once, and the nearest legal value it names is legal."""

from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, load_config, rules
from megatron_lite.config.nearest import nearest_divisor, nearest_multiple
from megatron_lite.config.rulebook import RULES

ROPE = "model.position_embedding=rope"
YARN = 'model.rotary_scaling={"type": "yarn", "factor": 2, "original_max_position_embeddings": 32}'

# what breaks the rule | part of the one line that must come | what repairs it (mostly the nearest it names)
CASES: dict[str, tuple[list[str], str, list[str]]] = {
    "heads divide the width": (
        ["model.hidden_size=67"],
        "model.hidden_size: 67 does not divide by num_attention_heads = 4; nearest: 68",
        ["model.hidden_size=68"],
    ),
    "heads with their own width": (
        ["model.hidden_size=66"],
        "model.hidden_size: 66 does not divide",
        ["model.kv_channels=16"],
    ),
    "groups divide heads": (
        ["model.num_query_groups=3"],
        "model.num_query_groups: 3 does not divide num_attention_heads = 4; nearest: 2",
        ["model.num_query_groups=2"],
    ),
    "odd rotary width": (
        [ROPE, "model.kv_channels=15"],
        "model.rotary_percent: 1.0 of a head of 15 rotates 15 channels; that must be even and at least 2; "
        "nearest: 0.93333",
        ["model.rotary_percent=0.9333333333333333"],
    ),
    "no rotary width": (
        [ROPE, "model.rotary_percent=0.1"],
        "model.rotary_percent: 0.1 of a head of 16 rotates 1 channels",
        ["model.rotary_percent=0.125"],
    ),
    "odd part of a head": (
        [ROPE, "model.rotary_percent=0.2"],
        "model.rotary_percent: 0.2 of a head of 16 rotates 3 channels; that must be even and at least 2; "
        "nearest: 0.25",
        ["model.rotary_percent=0.25"],
    ),
    "heads too narrow to rotate": (
        [ROPE, "model.kv_channels=1"],
        "model.kv_channels: rope needs heads at least 2 wide, not 1; nearest: 2",
        ["model.kv_channels=2"],
    ),
    "scaling without rope": (
        ['model.rotary_scaling={"type": "linear", "factor": 2}'],
        'model.rotary_scaling: needs position_embedding = "rope", not "learned_absolute"; nearest: null',
        ["model.rotary_scaling=null"],
    ),
    "scaling from an unknown length": (
        [ROPE, 'model.rotary_scaling={"type": "llama3", "factor": 2}'],
        "model.rotary_scaling.original_max_position_embeddings: is required by type llama3 (tokens "
        "the model was "
        "first trained on, for example 32)",
        ["model.rotary_scaling.original_max_position_embeddings=32"],
    ),
    "llama3 factors": (
        [
            ROPE,
            'model.rotary_scaling={"type": "llama3", "factor": 2, "original_max_position_embeddings": 32}',
            "model.rotary_scaling.low_freq_factor=4",
        ],
        "model.rotary_scaling.low_freq_factor: 4.0 must be less than high_freq_factor = 4.0; nearest: 1.0",
        ["model.rotary_scaling.low_freq_factor=1.0"],
    ),
    "yarn factors": (
        [ROPE, YARN, "model.rotary_scaling.beta_slow=32"],
        "model.rotary_scaling.beta_slow: 32.0 must be less than beta_fast = 32.0; nearest: 1.0",
        ["model.rotary_scaling.beta_slow=1.0"],
    ),
    "positions cover the sequence": (
        ["model.max_position_embeddings=63"],
        "model.max_position_embeddings: 63 is less than seq_length; nearest: 64",
        ["model.max_position_embeddings=64"],
    ),
    "vocabulary from nowhere": (
        ["data.tokenizer=null"],
        "data.tokenizer: is required where model.vocab_size is null",
        ["model.vocab_size=300"],
    ),
    "tensor divides heads": (
        ["parallel.tensor=8"],
        "parallel.tensor: 8 does not divide model.num_attention_heads = 4 and model.num_query_groups "
        "= 4; nearest: 4",
        ["parallel.tensor=4"],
    ),
    "tensor divides groups": (
        ["parallel.tensor=4", "model.num_query_groups=2"],
        "parallel.tensor: 4 does not divide model.num_query_groups = 2; nearest: 2",
        ["parallel.tensor=2"],
    ),
    "tensor divides the feed-forward part": (
        ["parallel.tensor=4", "model.ffn_hidden_size=30"],
        "parallel.tensor: 4 does not divide model.ffn_hidden_size = 30; nearest: 2",
        ["parallel.tensor=2"],
    ),
    "tensor divides the vocabulary": (
        ["parallel.tensor=2", "model.vocab_size=65", "model.make_vocab_size_divisible_by=1"],
        "model.make_vocab_size_divisible_by: 1 pads the vocabulary to 65, which does not divide by "
        "parallel.tensor = 2; nearest: 2",
        ["model.make_vocab_size_divisible_by=2"],
    ),
    "sequence parallel alone": (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel: true needs parallel.tensor > 1; nearest: false",
        ["parallel.sequence_parallel=false"],
    ),
    "tensor divides the sequence": (
        ["parallel.sequence_parallel=true", "parallel.tensor=4", "model.seq_length=63"],
        "model.seq_length: 63 does not divide by parallel.tensor = 4, which sequence_parallel needs; "
        "nearest: 64",
        ["model.seq_length=64"],
    ),
    "a layer each stage": (
        ["parallel.pipeline=5"],
        "parallel.pipeline: 5 stages need a layer each, and model.num_layers is 4; nearest: 4",
        ["parallel.pipeline=4"],
    ),
    "partition has the stages": (
        ["parallel.pipeline=3", "parallel.pipeline_partition=[2,2]"],
        "parallel.pipeline_partition: [2, 2] has 2 stages and 4 layers; parallel.pipeline is 3 and "
        "model.num_layers "
        "4; for example [2, 1, 1], or null",
        ["parallel.pipeline_partition=[2,1,1]"],
    ),
    "partition has the layers": (
        ["model.num_layers=5", "parallel.pipeline=2", "parallel.pipeline_partition=[2,2]"],
        "parallel.pipeline_partition: [2, 2] has 2 stages and 4 layers; parallel.pipeline is 2 and "
        "model.num_layers 5; for example [3, 2], or null",
        ["parallel.pipeline_partition=[3,2]"],
    ),
    "micro-batches fill the batch": (
        ["train.global_batch_size=15"],
        "train.global_batch_size: 15 is no multiple of micro_batch_size = 2; nearest: 16",
        ["train.global_batch_size=16"],
    ),
    "kind of tokenizer": (
        ["data.tokenizer=tiktokn:a/b"],
        'data.tokenizer: "tiktokn" is no kind of tokenizer; did you mean tiktoken:a/b?',
        ["data.tokenizer=tiktoken:a/b"],
    ),
    "tokenizer without a file": (
        ["data.tokenizer=char:"],
        'data.tokenizer: "char:" names no file',
        ["data.tokenizer=char:a"],
    ),
    "no tokenizer at all": (
        ["data.tokenizer=bytes"],
        'data.tokenizer: "bytes" is neither byte, KIND:FILE nor a file; did you mean byte?',
        ["data.tokenizer=gpt2.json"],
    ),
    "not even like a tokenizer": (
        ["data.tokenizer=zzzzz"],
        'data.tokenizer: "zzzzz" is neither byte, KIND:FILE nor a file',
        ["data.tokenizer=folder/zzzzz"],
    ),
    "document ends unknown": (
        ["data.tokenizer=null", "model.vocab_size=300", "data.reset_attention_mask=true"],
        "data.reset_attention_mask: true needs data.tokenizer, to know where documents end; nearest: false",
        ["data.reset_attention_mask=false"],
    ),
    "split of words": (["data.split=a,b"], 'data.split: "a,b" is not one to three sizes', ["data.split=1,1"]),
    "split below zero": (["data.split=9,-1"], "data.split:", ["data.split=9,1"]),
    "split without training": (["data.split=0,1,1"], "data.split:", ["data.split=1,1,1"]),
    "split into nothing": (["data.split=inf,1"], "data.split:", ["data.split=1,1"]),
    "split in four": (["data.split=1,1,1,1"], "data.split:", ["data.split=1"]),
    "empty blend": (["data.train=[]"], "data.train: names no data; give a prefix, or null", ["data.train=a"]),
    "packing in Megatron's order": (
        ["data.packing=best_fit", "data.order=megatron"],
        'data.packing: best_fit needs data.order "epoch"',
        ["data.packing=concat"],
    ),
    "empty prefix": (["data.valid="], "data.valid: names no data", ["data.valid=a"]),
    "negative weight": (
        ['data.train=[[1, "a"], [-1, "b"]]'],
        "data.train: weights must not be negative, and one must be more than 0",
        ['data.train=[[1, "a"], [0, "b"]]'],
    ),
    "weights of zero": (['data.train=[[0, "a"]]'], "data.train: weights", ['data.train=[[1, "a"]]']),
    "evaluation on nothing": (
        ["train.eval_interval=5", "data.split=1"],
        "train.eval_interval: there is no validation data: data.valid is null and data.split",
        ["data.valid=a"],
    ),
    "evaluation beside test data of its own": (
        ["train.eval_interval=5", "data.test=a"],
        "train.eval_interval: there is no validation data: data.valid is null and where data.test is given, "
        "data.split is not used; nearest: set data.valid, or null",
        ["data.valid=a"],
    ),
    "rates in order": (
        ["optimizer.min_lr=0.01"],
        "optimizer.min_lr: 0.01 is more than lr = 0.001; nearest: 0.001",
        ["optimizer.min_lr=0.001"],
    ),
    "warmup before the end": (
        ["optimizer.warmup_steps=20"],
        "optimizer.warmup_steps: 20 must be less than train.steps = 20; nearest: 19",
        ["optimizer.warmup_steps=19"],
    ),
    "warmup before decay ends": (
        ["optimizer.warmup_steps=10", "optimizer.decay_steps=10"],
        "optimizer.warmup_steps: 10 must be less than optimizer.decay_steps = 10; nearest: 9",
        ["optimizer.warmup_steps=9"],
    ),
    "wsd decay fits": (
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=15", "optimizer.wsd_decay_steps=6"],
        "optimizer.wsd_decay_steps: 6 steps of decay after 15 of warmup do not fit into train.steps "
        "= 20; nearest: 5",
        ["optimizer.wsd_decay_steps=5"],
    ),
    "wsd decay of another schedule": (
        ["optimizer.wsd_decay_steps=6"],
        'optimizer.wsd_decay_steps: is for schedule "wsd", and it is "cosine"; nearest: null',
        ["optimizer.wsd_decay_steps=null"],
    ),
    "fp16 on a CPU": (
        ["train.precision=fp16", "train.device=cpu"],
        'train.precision: fp16 does not run on a CPU; nearest: "bf16"',
        ["train.precision=bf16"],
    ),
    "zero 2 in a pipeline": (
        ["parallel.pipeline=2", "deepspeed.zero_optimization.stage=2"],
        "deepspeed.zero_optimization.stage: 2 partitions gradients",
        ["deepspeed.zero_optimization.stage=1"],
    ),
    "zero 3 in a pipeline": (
        ["parallel.pipeline=2", "deepspeed.zero_optimization.stage=3"],
        "deepspeed.zero_optimization.stage: 3 partitions gradients",
        ["deepspeed.zero_optimization.stage=1"],
    ),
    "zero 0 in a bf16 pipeline": (
        ["parallel.pipeline=2", "deepspeed.zero_optimization.stage=0", "train.precision=bf16"],
        "deepspeed.zero_optimization.stage: 0 with parallel.pipeline > 1 and bf16 clips by a wrong "
        "norm; nearest: 1",
        ["train.precision=fp32"],
    ),
    "zero 0 in bf16 with tensor parallelism": (
        ["parallel.tensor=2", "deepspeed.zero_optimization.stage=0", "train.precision=bf16"],
        "deepspeed.zero_optimization.stage: 0 with parallel.tensor > 1 and bf16 clips by a wrong "
        "norm; nearest: 1",
        ["deepspeed.zero_optimization.stage=1"],
    ),
    "deepspeed contradicts": (
        ["deepspeed.gradient_clipping=0.5"],
        "deepspeed.gradient_clipping: 0.5 contradicts optimizer.grad_clip, which says 1.0",
        ["optimizer.grad_clip=0.5"],
    ),
}


def problems(path: Path, overrides: list[str]) -> list[str]:
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize("name", CASES)
def test_broken_and_repaired(small: Path, name: str) -> None:
    broken, message, repair = CASES[name]
    found = problems(small, broken)
    assert len(found) == 1 and found[0].startswith(message), found
    assert problems(small, broken + repair) == []


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda index: RULES[index][1].__name__)
def test_a_rule_removed_is_missed(small: Path, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Without any one rule some case above goes unnoticed."""
    monkeypatch.setattr(rules, "RULES", RULES[:index] + RULES[index + 1 :])
    assert any(not problems(small, broken) for broken, _, _ in CASES.values())


def test_rules_are_left_out_while_a_key_they_read_is_wrong(small: Path) -> None:
    assert problems(small, ["parallel.tensor=3"])
    assert [
        line.partition(":")[0] for line in problems(small, ["parallel.tensor=3", "model.num_layers=x"])
    ] == [
        "model.num_layers",
        "parallel.tensor",
    ]
    assert len(problems(small, ["parallel.tensor=3", "model.ffn_hidden_size=x"])) == 1


def test_legal_neighbours(small: Path) -> None:
    legal = [
        ["parallel.pipeline=4"],
        ["parallel.tensor=4", "parallel.sequence_parallel=true"],
        ["parallel.tensor=2", "deepspeed.zero_optimization.stage=0"],
        ["parallel.tensor=2", "deepspeed.zero_optimization.stage=3"],
        ["deepspeed.zero_optimization.stage=0", "train.precision=bf16"],
        ["parallel.pipeline=2", "deepspeed.zero_optimization.stage=0"],
        ["parallel.pipeline=2", "deepspeed.zero_optimization.stage=1"],
        ["data.reset_position_ids=true", "data.reset_attention_mask=true"],
        ["model.qk_layernorm=true", "model.num_query_groups=1"],
        [ROPE, "model.max_position_embeddings=8", YARN],
        [ROPE, "model.kv_channels=2"],
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=18"],
        ["train.precision=fp16"],
        ["data.split=1,0,1"],
        ["train.eval_interval=5", "data.split=1", "data.valid=a"],
    ]
    assert [problems(small, overrides) for overrides in legal] == [[]] * len(legal)


@pytest.mark.parametrize(("number", "wanted", "nearest"), [(12, 5, 4), (12, 100, 12), (7, 3, 1), (12, 0, 1)])
def test_nearest_divisor(number: int, wanted: int, nearest: int) -> None:
    assert nearest_divisor(number, wanted) == nearest


@pytest.mark.parametrize(
    ("number", "of", "nearest"), [(16, 6, 18), (1, 8, 8), (13, 8, 16), (11, 8, 8), (8, 8, 8)]
)
def test_nearest_multiple(number: int, of: int, nearest: int) -> None:
    assert nearest_multiple(number, of) == nearest
