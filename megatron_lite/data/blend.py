"""Several datasets mixed in given proportions, in Megatron's order."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data import _index
from megatron_lite.data.cache import Arrays, cached
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import SampleDataset, read_rows, reader_of

logger = logging.getLogger(__name__)

_FORMAT = 2  # of the cached arrays
_CHUNK = 1 << 20
BlendIndex = tuple[NDArray[np.int16], NDArray[np.int64]]


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in float64."""
    values = np.asarray(weights, dtype=np.float64)
    return (values / values.sum()).tolist()


def used_members(members: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The (weight, prefix) pairs that take part: those of weight zero drop out, with a message.

    Raises DatasetError for a weight that is negative or not finite, and where none is left.
    """
    for weight, prefix in members:
        if not math.isfinite(weight) or weight < 0:
            raise DatasetError(f"{prefix}: weight {weight} of the blend; weights are zero or more")
    used = [(weight, prefix) for weight, prefix in members if weight > 0]
    if not used:
        raise DatasetError("the blend has no dataset of a weight above zero")
    if len(used) > np.iinfo(np.int16).max:
        raise DatasetError(f"a blend of {len(used):,} datasets: 32,767 at most; merge some of them")
    for weight, prefix in members:
        if weight == 0:
            logger.warning("%s: weight 0 in the blend, left out", prefix)
    return used


def blend_index(
    weights: Sequence[float], size: int, limits: Sequence[int] | None = None, cache_dir: Path | None = None
) -> BlendIndex:
    """(dataset number [size] int16, sample number in that dataset [size] int64) of every sample of the blend.

    At step n the dataset with the largest weight * max(n, 1) - taken gives its next sample (the lowest number
    wins a tie), so that every beginning of the blend has the asked proportions.

    limits: samples each dataset has; one that is used up is passed over
    """
    shares = normalized(weights)
    key = {"blend": _FORMAT, "weights": shares, "size": size, "limits": limits and list(limits)}

    def build() -> Arrays:
        dataset, sample = _index.build_blend_index(
            np.asarray(shares), size, np.asarray(limits or [], dtype=np.int64)
        )
        return {"dataset": dataset, "sample": sample}

    arrays = cached(cache_dir, key, build, f"blend of {len(shares)} datasets")
    return arrays["dataset"], arrays["sample"]


def taken(dataset: NDArray[np.int16], members: int) -> list[int]:
    """How often each of `members` numbers occurs (bincount needs eight bytes for every one it counts)."""
    counts = np.zeros(members, np.int64)
    for first in range(0, len(dataset), _CHUNK):
        counts += np.bincount(dataset[first : first + _CHUNK], minlength=members)
    return counts.tolist()


class BlendedDataset:
    """`datasets` read in the order of `index` (see `blend_index`).

    reader: reads samples in C++; None where one of the datasets is not read so

    Raises DatasetError where the order takes more samples from a dataset than it has.
    """

    def __init__(self, datasets: Sequence[SampleDataset], index: BlendIndex) -> None:
        self.datasets = list(datasets)
        self._dataset, self._sample = index
        taken = self.taken(len(self))
        for number, dataset in enumerate(self.datasets):
            if taken[number] > len(dataset):
                raise DatasetError(
                    f"dataset {number} of the blend has {len(dataset):,} samples, the blend takes "
                    f"{taken[number]:,}: "
                    'ask for more samples, or take data.order "epoch", which makes as many as it needs'
                )

        readers = [reader_of(dataset) for dataset in self.datasets]
        native = [reader for reader in readers if reader is not None]
        self.reader = _index.BlendedSamples(native, *index) if len(native) == len(readers) else None

    def __len__(self) -> int:
        return len(self._dataset)

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each dataset."""
        return taken(self._dataset[:samples], len(self.datasets))

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample:,} of {len(self):,} of the blend")
        return self.datasets[self._dataset[sample]][int(self._sample[sample])]

    def batch(self, samples: Sequence[int] | range) -> NDArray[np.int64]:
        if self.reader is not None:
            return read_rows(self.reader, samples)
        return np.stack([self[sample] for sample in samples])
