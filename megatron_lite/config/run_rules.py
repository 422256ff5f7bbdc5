"""Rules of the run: batches, data, schedule, precision and ZeRO."""

from __future__ import annotations

from collections.abc import Iterator

from . import checks, deepspeed_section
from .errors import Problem, closest
from .nearest import nearest_multiple
from .rulebook import rule
from .sections import TOKENIZER_KINDS, Prefixes, prefixes, split_sizes
from .tree import Config


@rule("train.global_batch_size", "train.micro_batch_size")
def batches_divide(config: Config) -> Iterator[Problem]:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % micro:
        nearest = nearest_multiple(batch, micro)
        yield Problem(
            "train.global_batch_size",
            f"{batch} is no multiple of micro_batch_size = {micro}; nearest: {nearest}",
        )


@rule("data.tokenizer")
def tokenizer_spec(config: Config) -> Iterator[Problem]:
    spec = config.data.tokenizer
    if spec is None or spec == "byte":
        return
    kind, colon, path = spec.partition(":")
    if not colon:
        if not any(mark in spec for mark in "./"):
            match = closest(spec, ("byte", *TOKENIZER_KINDS))
            meant = "; did you mean " + (match if match == "byte" else f"{match}:FILE") + "?" if match else ""
            yield Problem("data.tokenizer", f'"{spec}" is neither byte, KIND:FILE nor a file{meant}')
    elif kind not in TOKENIZER_KINDS:
        match = closest(kind, TOKENIZER_KINDS)
        meant = f"; did you mean {match}:{path}?" if match else f"; kinds: {', '.join(TOKENIZER_KINDS)}"
        yield Problem("data.tokenizer", f'"{kind}" is no kind of tokenizer{meant}')
    elif not path:
        yield Problem("data.tokenizer", f'"{spec}" names no file; for example "{kind}:path/to/file"')


@rule("data.tokenizer", "data.eod_mask_loss", "data.reset_position_ids", "data.reset_attention_mask")
def document_ends_known(config: Config) -> Iterator[Problem]:
    for key in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        if getattr(config.data, key) and config.data.tokenizer is None:
            yield Problem(
                f"data.{key}", "true needs data.tokenizer, to know where documents end; nearest: false"
            )


@rule("data.packing", "data.order")
def packing_in_own_order(config: Config) -> Iterator[Problem]:
    if config.data.packing == "best_fit" and config.data.order == "megatron":
        yield Problem(
            "data.packing", 'best_fit needs data.order "epoch": Megatron joins documents; nearest: concat'
        )


@rule("data.split")
def split_readable(config: Config) -> Iterator[Problem]:
    try:
        split_sizes(config.data.split)
    except ValueError as error:
        yield Problem("data.split", str(error))


@rule("data.train", "data.valid", "data.test")
def blends(config: Config) -> Iterator[Problem]:
    for key in ("train", "valid", "test"):
        value: Prefixes | None = getattr(config.data, key)
        if value is None:
            continue
        names = prefixes(value)
        weights = [item[0] for item in value if isinstance(item, tuple)]
        if not names or not all(names):
            yield Problem(f"data.{key}", "names no data; give a prefix, or null")
        elif weights and (min(weights) < 0 or not any(weights)):
            yield Problem(f"data.{key}", "weights must not be negative, and one must be more than 0")


@rule("train.eval_interval", "data.valid", "data.test", "data.split")
def evaluation_data(config: Config) -> Iterator[Problem]:
    data = config.data
    if config.train.eval_interval is None or data.valid is not None:
        return
    if data.test is not None:
        lacking, nearest = "where data.test is given, data.split is not used", "set data.valid, or null"
    elif _without_validation(data.split):
        lacking, nearest = f'data.split "{data.split}" leaves none', "null"
    else:
        return
    yield Problem(
        "train.eval_interval",
        f"there is no validation data: data.valid is null and {lacking}; nearest: {nearest}",
    )


def _without_validation(split: str) -> bool:
    try:
        return not split_sizes(split)[1]
    except ValueError:
        return False  # reported as what it is


@rule("optimizer.lr", "optimizer.min_lr")
def rates_ordered(config: Config) -> Iterator[Problem]:
    lr, least = config.optimizer.lr, config.optimizer.min_lr
    if least > lr:
        yield Problem("optimizer.min_lr", f"{least} is more than lr = {lr}; nearest: {lr}")


@rule(
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.wsd_decay_steps",
    "optimizer.schedule",
    "train.steps",
)
def schedule_fits(config: Config) -> Iterator[Problem]:
    optimizer, end, warmup = config.optimizer, config.decay_steps, config.optimizer.warmup_steps
    source = "train.steps" if optimizer.decay_steps is None else "optimizer.decay_steps"
    if warmup >= end:
        yield Problem(
            "optimizer.warmup_steps", f"{warmup} must be less than {source} = {end}; nearest: {end - 1}"
        )
    elif optimizer.schedule == "wsd" and warmup + config.wsd_decay_steps > end:
        yield Problem(
            "optimizer.wsd_decay_steps",
            f"{config.wsd_decay_steps} steps of decay after {warmup} of warmup do not fit into {source} = "
            f"{end}; nearest: {end - warmup}",
        )
    if optimizer.schedule != "wsd" and optimizer.wsd_decay_steps is not None:
        yield Problem(
            "optimizer.wsd_decay_steps",
            f'is for schedule "wsd", and it is "{optimizer.schedule}"; nearest: null',
        )


@rule("train.precision", "train.device")
def precision_on_device(config: Config) -> Iterator[Problem]:
    yield from checks.fp16_on(config, config.train.device)


@rule(
    "deepspeed.zero_optimization",
    "parallel.pipeline",
    "parallel.tensor",
    "train.precision",
)
def zero_stage_fits(config: Config) -> Iterator[Problem]:
    stage, precision = config.zero_stage, config.train.precision
    pipeline, tensor = config.parallel.pipeline, config.parallel.tensor
    reason = None
    if stage > 1 and pipeline > 1:
        reason = "partitions gradients, which the pipeline must keep whole until the step's end"
    elif stage == 0 and precision != "fp32" and max(pipeline, tensor) > 1:
        key = "pipeline" if pipeline > 1 else "tensor"
        reason = f"with parallel.{key} > 1 and {precision} clips by a wrong norm"
    if reason:
        yield Problem("deepspeed.zero_optimization.stage", f"{stage} {reason}; nearest: 1")


@rule(
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.precision",
    "train.steps",
    "optimizer",
    "logging.interval",
    "parallel.tensor",
)
def deepspeed_agrees(config: Config) -> Iterator[Problem]:
    yield from deepspeed_section.check_values(config)
