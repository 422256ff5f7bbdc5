"""From the `data` section of a config to the training, validation and test datasets."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from megatron_lite.data.blend import BlendedDataset, blend_index, normalized, used_members
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import GPTDataset, SampleDataset
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.position import Position, Source, continued, source_key
from megatron_lite.data.sample_index import split_edges

if TYPE_CHECKING:  # settings take 0.1 s to load, which tools over corpora do not need
    from megatron_lite.config import Config, DataConfig

logger = logging.getLogger(__name__)

Split = Literal["train", "valid", "test"]
_NAMES: tuple[Split, ...] = get_args(Split)
_SURPLUS = 0.005  # Megatron builds each dataset of a blend this much longer than its share


class _Member(NamedTuple):
    weight: float | None
    indexed: IndexedDataset
    documents: range
    source: Source | None = None  # where a run goes on with it


class _Settings(NamedTuple):
    config: DataConfig
    seq_length: int
    seed: int
    name: Split

    @property
    def own_files(self) -> bool:
        """Each split has files of its own; else data.train is divided."""
        return self.config.valid is not None or self.config.test is not None

    def dataset(self, member: _Member, num_samples: int | None) -> GPTDataset:
        return GPTDataset(
            member.indexed,
            member.documents,
            num_samples,
            self.seq_length,
            self.seed if member.source is None else member.source.seed,
            order=self.config.order,
            packing=self.config.packing,
            history=() if member.source is None else member.source.history,
            name=self.name,
            cache_dir=self.config.cache_dir,
        )


def build_datasets(
    config: DataConfig,
    seq_length: int,
    seed: int,
    train_samples: int | None,
    valid_samples: int | None = 0,
    test_samples: int | None = 0,
) -> tuple[SampleDataset, SampleDataset | None, SampleDataset | None]:
    """The (training, validation, test) datasets; None for one that is not asked for or has no data.

    Where data.valid or data.test is given each uses its own files whole; else data.train is divided by
    data.split.

    *_samples: samples wanted, over as many epochs as they take; 0: not wanted; None: the data once. The
        length of a dataset is what was asked for (order "megatron": that or more).

    Raises DatasetError (a ValueError) for files that are missing or damaged, an empty split, and weights or a
    data.split that make no sense.
    """
    opened: dict[str, IndexedDataset] = {}
    train, valid, test = (
        _build_split(_Settings(config, seq_length, seed, name), samples, opened)
        for name, samples in zip(_NAMES, (train_samples, valid_samples, test_samples), strict=True)
    )
    if train is None:
        raise DatasetError("0 training samples: ask for some, or `build_dataset` for another split alone")
    return train, valid, test


def build_dataset(
    config: DataConfig, name: Split, seq_length: int, seed: int, samples: int | None
) -> SampleDataset | None:
    """One of the three datasets of `build_datasets`, exactly as it is there; the others are not read."""
    return _build_split(_Settings(config, seq_length, seed, name), samples, {})


class RunData(NamedTuple):
    """The datasets of a run.

    train: from sample `position.first` of the run on, to its end
    position: for the checkpoint, see `state`
    """

    train: SampleDataset
    valid: SampleDataset | None
    test: SampleDataset | None
    position: Position

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """The position at this sample of the run, as JSON."""
        given = consumed_samples - self.position.first
        return self.position.state(
            self.train.taken(given) if isinstance(self.train, BlendedDataset) else [given]
        )


def build_run(
    config: Config, step: int = 0, consumed_samples: int = 0, saved: dict[str, Any] | None = None
) -> RunData:
    """The datasets of the run that `config` describes, from where it is.

    The training set has as many samples as the run takes to its last step, also where an earlier part had
    other batches; the others as many as an evaluation takes.

    step, consumed_samples: where the run is
    saved: what `RunData.state` gave there; None: the run has only had these settings, as far as is known

    Raises DatasetError as `build_datasets` does, and where order "megatron" was to change within a run.
    """
    train, data, seq_length = config.train, config.data, config.model.seq_length
    samples = consumed_samples + max(0, train.steps - step) * train.global_batch_size
    held_out = train.eval_steps * train.global_batch_size if train.eval_interval is not None else 0
    settings = {name: _Settings(data, seq_length, train.seed, name) for name in _NAMES}
    opened: dict[str, IndexedDataset] = {}
    members = _split_members(settings["train"], opened)
    if not members:
        raise DatasetError("data.train names no data for training")
    position = Position(data.order, seq_length, data.packing, 0, samples, _sources(members, train.seed))
    if saved is not None:
        position = continued(position, saved, consumed_samples)
        if position.first == consumed_samples:
            _log_sources(position)
    members = [m._replace(source=s) for m, s in zip(members, position.sources, strict=False)]
    rest = max(1, samples - position.first)  # a run may begin its last mixture when it is done
    train_set = _build(settings["train"], members, rest)
    valid, test = (_build_split(settings[name], held_out, opened) for name in ("valid", "test"))
    return RunData(train_set, valid, test, position)


def _sources(members: list[_Member], seed: int) -> tuple[Source, ...]:
    weights = [_tokens(member) if member.weight is None else member.weight for member in members]
    return tuple(
        Source(
            source_key(m.indexed, m.documents),
            m.indexed.prefix,
            (m.documents.start, m.documents.stop),
            weight,
            seed,
        )
        # Without any token, building the datasets says what is wrong.
        for m, weight in zip(members, normalized(weights) if any(weights) else weights, strict=True)
    )


def _log_sources(position: Position) -> None:
    """Where each source goes on in another mixture, since that may surprise."""
    for source in position.sources:
        taken = sum(taken.samples for taken in source.history)
        if not source.weight:
            logger.info("data: %s is left out from sample %d on", source.prefix, position.first)
        elif taken:
            logger.info("data: %s goes on after the %d samples it gave", source.prefix, taken)
        else:
            logger.info("data: %s begins at sample %d of the run", source.prefix, position.first)


def _build_split(
    settings: _Settings, samples: int | None, opened: dict[str, IndexedDataset]
) -> SampleDataset | None:
    if samples == 0:
        return None
    members = _split_members(settings, opened)
    return _build(settings, members, samples) if members else None


def _split_members(settings: _Settings, opened: dict[str, IndexedDataset]) -> list[_Member] | None:
    config, name = settings.config, settings.name
    if config.train is None:
        raise DatasetError("data.train is not set: give the prefix of a .bin/.idx pair")
    prefixes = getattr(config, name) if settings.own_files else config.train
    if prefixes is None:
        return None
    return _members(prefixes, None if settings.own_files else config.split, _NAMES.index(name), opened)


def _members(
    prefixes: str | tuple[str, ...] | tuple[tuple[float, str], ...],
    split: str | None,
    number: int,
    opened: dict[str, IndexedDataset],
) -> list[_Member] | None:
    """What a split is made of; None where data.split gives it nothing."""
    named: list[tuple[float | None, str]] = []
    pairs: list[tuple[float, str]] = []
    for entry in (prefixes,) if isinstance(prefixes, str) else prefixes:
        if isinstance(entry, str):
            named.append((None, entry))
        else:
            pairs.append(entry)
    if pairs:
        named += used_members(pairs)
    members = []
    for weight, prefix in named:
        if prefix not in opened:
            opened[prefix] = IndexedDataset(prefix)
        indexed = opened[prefix]
        documents = split_edges(split, len(indexed))[number] if split else range(len(indexed))
        if documents is None:
            return None
        members.append(_Member(weight, indexed, documents))
    return members


def _build(settings: _Settings, members: list[_Member], samples: int | None) -> SampleDataset:
    weighted = members[0].weight is not None
    megatron = settings.config.order == "megatron"
    if len(members) == 1 and not (megatron and weighted and not settings.own_files):
        return settings.dataset(members[0], samples)
    if not weighted and (megatron or samples is None):
        return _proportional_blend(settings, members, samples)
    if samples is None:
        raise DatasetError(
            f"data.{settings.name}: a weighted blend has no natural length; name a number of samples"
        )
    if megatron:
        return _megatron_blend(settings, members, samples)
    weights = [member.weight or 0.0 for member in members] if weighted else [_tokens(m) for m in members]
    # The order first: it says exactly how many samples each dataset has to have.
    index = blend_index(weights, samples, cache_dir=_cache_dir(settings, members))
    counts = np.bincount(index[0], minlength=len(members)).tolist()
    return BlendedDataset([settings.dataset(m, n) for m, n in zip(members, counts, strict=True)], index)


def _proportional_blend(settings: _Settings, members: list[_Member], samples: int | None) -> BlendedDataset:
    """Each dataset once, mixed in proportion to their lengths (Megatron's rule for a blend without
    weights)."""
    datasets = [settings.dataset(member, None) for member in members]
    lengths = [len(dataset) for dataset in datasets]
    size, limits = sum(lengths), lengths
    if samples is not None:
        size, limits = min(samples, size), []
        if size < samples:
            logger.warning(
                "data.%s: the blend holds %d samples, %d were asked for", settings.name, size, samples
            )
    return BlendedDataset(datasets, blend_index(lengths, size, limits, _cache_dir(settings, members)))


def _megatron_blend(settings: _Settings, members: list[_Member], samples: int) -> BlendedDataset:
    """Megatron-core's sizes of a weighted blend, its rounding included."""
    weights = normalized([member.weight or 0.0 for member in members])
    targets = [math.ceil(samples * weight) for weight in weights]
    datasets = [
        settings.dataset(member, math.ceil(target * (1 + _SURPLUS)))
        for member, target in zip(members, targets, strict=True)
    ]
    return BlendedDataset(
        datasets, blend_index(weights, sum(targets), cache_dir=_cache_dir(settings, members))
    )


def _tokens(member: _Member) -> int:
    return int(member.indexed.lengths[member.documents.start : member.documents.stop].sum(dtype="int64"))


def _cache_dir(settings: _Settings, members: list[_Member]) -> Path:
    directory = settings.config.cache_dir
    return Path(directory) if directory else Path(members[0].indexed.prefix).parent / "index_cache"
