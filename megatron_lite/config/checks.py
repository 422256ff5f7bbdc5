"""What can only be checked where the run is: the number of ranks, the device, the files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import deepspeed_section
from .errors import Problem, touches
from .nearest import nearest_multiple
from .sections import prefixes

if TYPE_CHECKING:
    from .tree import Config


def check_world(config: Config, world_size: int, broken: Collection[str] = ()) -> Iterator[Problem]:
    """Whether `world_size` ranks fit the layout and the batch sizes; keys in `broken` are not looked at."""
    if any(touches("parallel", key) for key in broken):
        return
    parallel, train = config.parallel, config.train
    ranks = parallel.tensor * parallel.pipeline
    if world_size < 1 or world_size % ranks:
        are = "is" if world_size == 1 else "are"
        yield Problem(
            "parallel",
            f"this layout (tensor = {parallel.tensor} x pipeline = {parallel.pipeline}) needs a multiple "
            f"of {ranks} ranks; there {are} {world_size}",
        )
        return
    if any(touches("train", key) for key in broken):
        return
    copies = world_size // ranks
    samples = train.micro_batch_size * copies
    nearest = nearest_multiple(train.global_batch_size, samples)
    if train.global_batch_size % samples:
        yield Problem(
            "train.global_batch_size",
            f"{train.global_batch_size} is no multiple of micro_batch_size x data-parallel size = "
            f"{train.micro_batch_size} x {copies}; nearest: {nearest}",
        )
    elif not any(touches("deepspeed", key) for key in broken):
        yield from deepspeed_section.check_accumulation(
            config, train.global_batch_size // samples, world_size
        )


def missing_files(config: Config, broken: Collection[str] = ()) -> Iterator[Problem]:
    """Data, tokenizer and checkpoint that the configuration names and that are not there."""
    data = config.data
    if data.train is None and "data.train" not in broken and "data" not in broken:
        yield Problem("data.train", "is required to train; for example --set data.train=PREFIX")
    for key in ("train", "valid", "test"):
        for prefix in prefixes(getattr(data, key)):
            absent = [f"{prefix}{end}" for end in (".bin", ".idx") if not Path(f"{prefix}{end}").is_file()]
            if absent:
                yield Problem(f"data.{key}", f"{' and '.join(absent)}: no such file{_other_prefix(prefix)}")
    if data.tokenizer not in (None, "byte"):
        kind, colon, path = data.tokenizer.partition(":")
        path = path if colon else kind
        here = Path(path)
        if not here.exists() and not (kind == "gpt2" and any(here.parent.glob(f"{here.name}*"))):
            yield Problem("data.tokenizer", f"{path}: no such file")
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).exists():
        yield Problem("checkpoint.load", f"{config.checkpoint.load}: no such folder")


def _other_prefix(prefix: str) -> str:
    """The prefix that was probably meant: without the ending, or with what tools/preprocess_data.py adds."""
    for candidate in (prefix.removesuffix(".bin").removesuffix(".idx"), f"{prefix}_text_document"):
        if candidate != prefix and Path(f"{candidate}.idx").is_file():
            return f"; did you mean {candidate}?"
    return ""


def fp16_on(config: Config, device: str) -> Iterator[Problem]:
    """DeepSpeed refuses fp16 on a CPU; `device` is "cpu", "cuda" or (not known yet) "auto"."""
    if config.train.precision == "fp16" and device == "cpu":
        yield Problem("train.precision", 'fp16 does not run on a CPU; nearest: "bf16"')


def tensor_divides_vocabulary(config: Config) -> Iterator[Problem]:
    """The padded vocabulary is split evenly over the tensor-parallel ranks, once its size is known."""
    model, tensor = config.model, config.parallel.tensor
    multiple = model.make_vocab_size_divisible_by
    if model.vocab_size is not None and model.padded_vocab_size % tensor:
        yield Problem(
            "model.make_vocab_size_divisible_by",
            f"{multiple} pads the vocabulary to {model.padded_vocab_size}, which does not divide by "
            f"parallel.tensor = {tensor}; nearest: {nearest_multiple(multiple, tensor)}",
        )


def warnings(config: Config, world_size: int) -> list[str]:
    """What is legal but probably not meant, one line each. Raises ConfigError when the ranks do not fit."""
    found = []
    stages, batches = config.parallel.pipeline, config.accumulation_steps(world_size)
    if batches < stages:
        idle = (stages - 1) / (batches + stages - 1)
        better = stages * config.train.global_batch_size // batches
        found.append(
            f"train.global_batch_size: {batches} micro-batches on {stages} pipeline stages leave the stages "
            f"idle {idle:.0%} of the time; {better} or more is better"
        )
    for key, interval in {
        "train.eval_interval": config.train.eval_interval,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.weights_interval": config.checkpoint.weights_interval,
    }.items():
        if interval is not None and interval > config.train.steps:
            found.append(f"{key}: {interval} is more than train.steps = {config.train.steps}")
    return found
