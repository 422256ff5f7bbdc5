"""Rules of the model's shape, alone and under tensor and pipeline parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator

from . import checks
from .errors import Problem
from .nearest import nearest_divisor, nearest_multiple
from .rulebook import rule
from .tree import Config


@rule("model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def heads_divide_width(config: Config) -> Iterator[Problem]:
    width, heads = config.model.hidden_size, config.model.num_attention_heads
    nearest = nearest_multiple(width, heads)
    if config.model.kv_channels is None and width % heads:
        yield Problem(
            "model.hidden_size",
            f"{width} does not divide by num_attention_heads = {heads}; nearest: {nearest} (or "
            "set model.kv_channels)",
        )


@rule("model.num_query_groups", "model.num_attention_heads")
def groups_divide_heads(config: Config) -> Iterator[Problem]:
    groups, heads = config.model.query_groups, config.model.num_attention_heads
    if heads % groups:
        nearest = nearest_divisor(heads, groups)
        yield Problem(
            "model.num_query_groups",
            f"{groups} does not divide num_attention_heads = {heads}; nearest: {nearest}",
        )


@rule(
    "model.position_embedding",
    "model.rotary_percent",
    "model.kv_channels",
    "model.hidden_size",
    "model.num_attention_heads",
)
def rotary_width(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.position_embedding != "rope":
        return
    if model.rotary_dim < 2 or model.rotary_dim % 2:
        width = model.head_dim
        if width < 2:
            message = f"rope needs heads at least 2 wide, not {width}; nearest: 2"
            yield Problem("model.kv_channels", message)
            return
        dim = min(width - width % 2, max(2, 2 * round(width * model.rotary_percent / 2)))
        yield Problem(
            "model.rotary_percent",
            f"{model.rotary_percent} of a head of {width} rotates {model.rotary_dim} channels; that must be "
            f"even and at least 2; nearest: {dim / width!r}",
        )


@rule("model.position_embedding", "model.rotary_scaling")
def rotary_scaling(config: Config) -> Iterator[Problem]:
    scaling, position = config.model.rotary_scaling, config.model.position_embedding
    if scaling is None:
        return
    if position != "rope":
        yield Problem(
            "model.rotary_scaling", f'needs position_embedding = "rope", not "{position}"; nearest: null'
        )
    if scaling.type != "linear" and scaling.original_max_position_embeddings is None:
        yield Problem(
            "model.rotary_scaling.original_max_position_embeddings",
            f"is required by type {scaling.type} (tokens the model was first trained on, for example "
            f"{max(1, round(config.model.seq_length / scaling.factor))})",
        )
    if scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Problem(
            "model.rotary_scaling.low_freq_factor",
            f"{scaling.low_freq_factor} must be less than high_freq_factor = {scaling.high_freq_factor}; "
            f"nearest: {scaling.high_freq_factor / 4}",
        )
    if scaling.type == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        yield Problem(
            "model.rotary_scaling.beta_slow",
            f"{scaling.beta_slow} must be less than beta_fast = {scaling.beta_fast}; "
            f"nearest: {scaling.beta_fast / 32}",
        )


@rule("model.position_embedding", "model.max_position_embeddings", "model.seq_length")
def positions_cover_sequence(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.position_embedding == "learned_absolute" and model.max_positions < model.seq_length:
        yield Problem(
            "model.max_position_embeddings",
            f"{model.max_positions} is less than seq_length; nearest: {model.seq_length}",
        )


@rule("model.vocab_size", "data.tokenizer")
def vocabulary_known(config: Config) -> Iterator[Problem]:
    if config.model.vocab_size is None and config.data.tokenizer is None:
        yield Problem("data.tokenizer", 'is required where model.vocab_size is null; for example "byte"')


@rule(
    "parallel.tensor",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.hidden_size",
    "model.activation",
)
def tensor_divides_layers(config: Config) -> Iterator[Problem]:
    model, tensor = config.model, config.parallel.tensor
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "ffn_hidden_size": model.ffn_size,
    }
    nearest = nearest_divisor(math.gcd(*sizes.values()), tensor)
    bad = [f"model.{name} = {size}" for name, size in sizes.items() if size % tensor]
    if bad:
        yield Problem("parallel.tensor", f"{tensor} does not divide {' and '.join(bad)}; nearest: {nearest}")


@rule("parallel.tensor", "model.vocab_size", "model.make_vocab_size_divisible_by")
def tensor_divides_vocabulary(config: Config) -> Iterator[Problem]:
    yield from checks.tensor_divides_vocabulary(config)


@rule("parallel.sequence_parallel", "parallel.tensor", "model.seq_length")
def sequence_parallel(config: Config) -> Iterator[Problem]:
    length, tensor = config.model.seq_length, config.parallel.tensor
    if not config.parallel.sequence_parallel:
        return
    if tensor == 1:
        yield Problem("parallel.sequence_parallel", "true needs parallel.tensor > 1; nearest: false")
    elif length % tensor:
        yield Problem(
            "model.seq_length",
            f"{length} does not divide by parallel.tensor = {tensor}, which sequence_parallel needs; "
            f"nearest: {nearest_multiple(length, tensor)}",
        )


@rule("parallel.pipeline", "parallel.pipeline_partition", "model.num_layers")
def pipeline_stages(config: Config) -> Iterator[Problem]:
    layers, stages = config.model.num_layers, config.parallel.pipeline
    partition = config.parallel.pipeline_partition
    if stages > layers:
        yield Problem(
            "parallel.pipeline",
            f"{stages} stages need a layer each, and model.num_layers is {layers}; nearest: {layers}",
        )
    elif partition is not None and (len(partition) != stages or sum(partition) != layers):
        even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
        yield Problem(
            "parallel.pipeline_partition",
            f"{list(partition)} has {len(partition)} stages and {sum(partition)} layers; parallel.pipeline "
            f"is {stages} and model.num_layers {layers}; for example {even}, or null",
        )
