"""What a checkpoint of a run holds beside the weights, and taking a run up again."""

import contextlib
import logging
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lite.checkpoint import (
    TOKENIZER,
    CheckpointError,
    DamagedCheckpoint,
    Reader,
    search,
    search_output,
)
from megatron_lite.config import Config
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.training.engine import Engine
from megatron_lite.training.optimizer_state import MOMENTS, differs_in_padding

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
# What of a checkpoint's metadata the run that starts from it hands on to its own.
_HANDED_ON = ("huggingface", TOKENIZER)


@dataclass
class Progress:
    """Where training is; all of it that is not in the engine.

    Data order and dropout are functions of (seed, position), so there is no generator state to keep.

    Attributes:
        data: what each source of the data has given, see `data.position`; None in old checkpoints.
        origin: what the weights came from, by its key in the metadata: what an import keeps for an export, and which
            tokenizer they were trained with.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    data: dict[str, Any] | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def gather(value: object, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank; `group` is one of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def agreed_failure() -> Iterator[None]:
    """Turns a ValueError or OSError on any rank into a ValueError on every rank, so that none waits for another.

    It is a DamagedCheckpoint where any rank's is, since that has a remedy.
    """
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = isinstance(error, DamagedCheckpoint), str(error)
    faults = [(*fault, rank) for rank, fault in enumerate(gather(mine)) if fault is not None]
    if faults:
        damaged, fault, rank = max(faults, key=lambda fault: fault[0])
        if len(faults) < dist.get_world_size():
            fault = f"rank {rank}: {fault}"
        raise DamagedCheckpoint(fault) if damaged else ValueError(fault)


def metadata_of(engine: Engine, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds beside the pieces; a copy, which later steps do not change."""
    config, mesh = engine.config, engine.mesh
    place = asdict(progress)
    return {
        **place.pop("origin"),
        "progress": place,
        "engine": engine.state(),
        "config": config.model_dump(mode="json"),
        "layout": {
            "tensor": mesh.tensor_size,
            "pipeline": mesh.pipeline_size,
            "data": mesh.data_size,
            "zero_stage": config.zero_stage,
            "sequence_parallel": mesh.sequence_parallel,
        },
    }


# Take what comes; or send what is wrong with it, and the next best comes.
Starts = Generator[Path | None, str | None, None]


def find_start(config: Config) -> Starts:
    """The checkpoint this run starts from, None for a fresh start; then what to take where that turns out damaged.

    Collective: the first rank looks. What it finds has an index and files of the right sizes; their bytes are for
    `load_checkpoint` to check. Each that is passed over is told, with what was wrong with it.

    Raises:
        ValueError: on every rank; resuming is required and there is nothing to resume, `checkpoint.load`
            names nothing, or every checkpoint in the output folder is damaged.
    """
    candidates, fault = _candidates(config), None
    while True:
        found: list[Any] = [None]
        with agreed_failure():
            if dist.get_rank() == 0:
                found[0] = candidates.send(fault)
        dist.broadcast_object_list(found)
        fault = yield found[0]


def _candidates(config: Config) -> Starts:
    """What `find_start` gives, on the first rank."""
    settings = config.checkpoint
    if settings.resume != "never":
        yield from search_output(config.train.output_dir)  # raises where all that there are were damaged
        if settings.resume == "required":
            raise CheckpointError(
                f"checkpoint.resume is required, but {config.train.output_dir} holds no checkpoint; "
                "set train.output_dir to the run's folder, or checkpoint.resume to auto"
            )
    if settings.load is not None:
        yield from search(settings.load)
    yield None


def read_progress(config: Config, path: Path | None, fingerprint: str | None = None) -> Progress:
    """Where the run that starts from this checkpoint is; None is a fresh start, and so is `weights_only`.

    Args:
        fingerprint: of the run's tokenizer, None where it has none.

    Raises:
        CheckpointError: it holds no optimizer state, and `checkpoint.weights_only` is not set.
    """
    origin = {} if fingerprint is None else {TOKENIZER: fingerprint}
    if path is None:
        return Progress(origin=origin)
    with Reader(path) as reader:
        found = {key: reader.metadata[key] for key in _HANDED_ON if key in reader.metadata}
        if dist.get_rank() == 0:
            _warn_of_another_tokenizer(config, reader, fingerprint)
        if _weights_only(config, reader):
            return Progress(origin=found | origin)
        if not _holds_training(reader):
            raise CheckpointError(
                f"{path} holds weights only, no optimizer state: to begin at step 0 with its weights, "
                "set checkpoint.weights_only to true"
            )
        progress = Progress(**reader.metadata["progress"], origin=found | origin)
        if dist.get_rank() == 0:
            old, new = reader.metadata["config"], config.model_dump(mode="json")
            _warn_of_changed_data(old, new, progress, by_name=not (TOKENIZER in found and origin))
        return progress


def _warn_of_another_tokenizer(config: Config, reader: Reader, fingerprint: str | None) -> None:
    """No error, since tokens added to a tokenizer for fine-tuning change its fingerprint, too; and only the user knows
    whether the others kept their ids."""
    before = reader.metadata.get(TOKENIZER)
    if before is None or fingerprint is None or before == fingerprint:
        return
    old, new = reader.metadata["config"]["data"]["tokenizer"], config.data.tokenizer
    logger.warning(
        "data.tokenizer %s is not the tokenizer that %s was trained with (%s): ids mean other tokens than in training. "
        "Go on only where tokens were added to the same one; else take that one again, and data made with it",
        *(new, reader.path, "the file has changed since" if old == new else f"that was {old}"),
    )


def _warn_of_changed_data(
    old: dict[str, Any], new: dict[str, Any], progress: Progress, *, by_name: bool
) -> None:
    """Without the position of each source, the position is a number of samples, which means something else where these
    changed. With it, only another part of a file, or other ids, are other data.

    Args:
        by_name: tokenizers are told apart by the name alone, as fingerprints are not known.
    """
    keys = [("data", "valid"), ("data", "split")] + [("data", "tokenizer")] * by_name
    if progress.data is None:
        keys += [("train", "seed"), ("model", "seq_length"), ("data", "train"), ("data", "order")]
    for section, key in keys:
        before, now = old.get(section, {}).get(key), new[section][key]
        if before != now:
            logger.warning(
                "%s.%s was %s and is %s: other samples follow, documents may be repeated or left out",
                *(section, key, before, now),
            )


def _holds_training(reader: Reader) -> bool:
    return "exp_avg" in reader.kinds and "progress" in reader.metadata


def _weights_only(config: Config, reader: Reader) -> bool:
    """Whether a run takes only the weights of the checkpoint that `find_start` found.

    `checkpoint.weights_only` is about what `checkpoint.load` names, not about what the run itself has saved: the same
    command goes on from that. In its output folder a checkpoint without training is one that was imported there.
    """
    output = Path(config.train.output_dir)
    own = config.checkpoint.resume != "never" and output in (reader.path.parent, reader.path.parent.parent)
    return config.checkpoint.weights_only and not (own and _holds_training(reader))


def load_checkpoint(engine: Engine, path: Path) -> None:
    """Takes weights, and what else `checkpoint.weights_only` leaves to take, from a checkpoint of any layout.

    Collective. Its checksums are compared while it is read; then ranks share the reading of what none has read whole.

    Raises:
        DamagedCheckpoint: on every rank; take another one, which overwrites all that was taken from this.
        ValueError: on every rank; it is of another model, and the message lists the parameters that differ.
    """
    names = {name for held in gather([name for name, _ in engine.named_parameters()]) for name in held}
    with contextlib.ExitStack() as stack:
        with agreed_failure():
            # Every rank makes its working copy of the weights, and where nothing is partitioned, of all.
            alone = engine.config.zero_stage > 0 or engine.mesh.data_size == 1
            reader = stack.enter_context(Reader(path, check=True, once=MOMENTS if alone else ()))
            if engine.mesh.rank == 0:
                reader.check_index()
            _check_model(engine, reader, names)
            weights_only = _weights_only(engine.config, reader)
            engine.load(reader, weights_only)
        kind, world_size = "weight" if weights_only else None, dist.get_world_size()
        reader.verify(kind, rank=dist.get_rank(), world_size=world_size, gather=gather)
        if not weights_only:
            engine.load_loss_scale(reader)


# What changes the function that the weights compute, without changing their shapes.
_STRUCTURE = ["num_attention_heads", "num_query_groups", "kv_channels", "position_embedding", "normalization"]
_STRUCTURE += ["norm_epsilon", "activation", "qk_layernorm"]
_ROTARY = ["rotary_base", "rotary_percent", "rotary_scaling"]


def _structure(model: dict[str, Any]) -> dict[str, Any]:
    """What of a model section, as JSON gives it, is compared: what the model uses, and two nulls as what they mean."""
    used = _STRUCTURE + (_ROTARY if model.get("position_embedding") == "rope" else [])
    found = {key: model[key] for key in used if key in model}
    if {"num_attention_heads", "hidden_size"} <= model.keys():
        heads = model["num_attention_heads"]
        meant = {"num_query_groups": heads, "kv_channels": model["hidden_size"] // heads}
        found |= {key: value for key, value in meant.items() if key in found and found[key] is None}
    return found


def _check_model(engine: Engine, reader: Reader, names: set[str]) -> None:
    """The model must be the one that was saved, `names` being all its parameters; checked before they are read."""
    held, faults = set(reader.names()), []
    old = reader.metadata.get("config", {}).get("model", {})
    new = engine.config.model.model_dump(mode="json")
    before, now = old.get("vocab_size") or 0, new["vocab_size"]
    for name, parameter in engine.named_parameters():
        spec = spec_of(parameter)
        if name not in held:
            faults.append(f"{name} is missing")
        elif (shape := reader.shape(name)) != spec.global_shape and not (
            0 < before <= now <= shape[0] and differs_in_padding(spec, shape)
        ):
            remedy = _positions_remedy(new, shape[0]) if name == "position.weight" else ""
            faults.append(f"{name} is {shape}, the model's is {spec.global_shape}{remedy}")
    faults += [f"{name} is not in the model" for name in sorted(held - names)]
    mine = _structure(new)
    faults += [
        f"model.{key} was {value} and is {mine[key]}"
        for key, value in _structure(old).items()
        if key in mine and mine[key] != value
    ]
    if before > now:
        # Fewer ids are another tokenizer's. They are not where the old number was one rounded up by hand.
        fault = f"model.vocab_size was {before} and is {now}, as with another tokenizer"
        faults.append(f"{fault} (with the same one set it to {before})")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise CheckpointError(f"{reader.path} is of another model: {shown}. Compare the model section")
    if 0 < before < now and engine.mesh.rank == 0:
        # Tokens added to the tokenizer take rows of padding; another tokenizer of about the same size looks alike.
        logger.warning(
            "model.vocab_size was %d and is %d: ids from %d on start untrained, and the others must mean what they "
            "meant: go on only where tokens were added to the same tokenizer",
            *(before, now, before),
        )


def _positions_remedy(model: dict[str, Any], rows: int) -> str:
    """What to set for a table of learned positions with so many rows: it has no more, however long samples are."""
    least = f" and model.seq_length to {rows} or less" if model["seq_length"] > rows else ""
    return f" (set model.max_position_embeddings to {rows}{least})"
