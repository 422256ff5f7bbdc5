"""Which keys came before: sorted runs of (key, position) on disk, and their merge in bounded memory.

Every rule of deduplication asks one question of a long stream of 128-bit keys, whose positions count from 0: at which
earlier position did the same key stand first? Each piece of the corpus writes its keys as sorted runs; the merge reads
one range of keys at a time out of all of them. Keys are hashes, hence spread evenly over their ranges, and a run holds
a key once, so that a key as frequent as can be takes no more than one place a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]  # [n, 2]; the first column is spread evenly over all 64 bits
Positions = NDArray[np.int64]

MERGE_BYTES = (
    136  # of memory a key while a range is merged: three columns, their copies, order and comparison
)


class Run(NamedTuple):
    """Keys of one stretch of positions. `path` holds rows (key, key, position) of the first of each key, sorted by
    key; `repeats` holds rows (first position, later position) of the others. Positions count within the piece."""

    path: str
    repeats: str


class RunWriter:
    """Keys in the order of their positions, written as runs of at most `limit` keys."""

    def __init__(self, folder: str | Path, name: str, limit: int) -> None:
        self.runs: list[Run] = []
        self._stem, self._limit = str(Path(folder, name)), max(limit, 1)
        self._keys: list[Keys] = []
        self._positions: list[Positions] = []
        self._held = 0

    def add(self, keys: Keys, positions: Positions) -> None:
        """positions: [n], ascending, from call to call too"""
        for start in range(0, len(keys), self._limit):
            part = slice(start, start + self._limit)
            if self._held + len(keys[part]) > self._limit:
                self._flush()
            self._keys.append(keys[part])
            self._positions.append(positions[part])
            self._held += len(keys[part])

    def finish(self) -> list[Run]:
        self._flush()
        return self.runs

    def _flush(self) -> None:
        if not self._held:
            return
        first, repeats = _first_of_each(np.concatenate(self._keys), np.concatenate(self._positions))
        self._keys, self._positions, self._held = [], [], 0
        stem = f"{self._stem}-{len(self.runs)}"
        run = Run(f"{stem}.keys.npy", f"{stem}.repeats.npy")
        np.save(run.path, np.stack([first[0], first[1], first[2].view(np.uint64)]))
        np.save(run.repeats, repeats)
        self.runs.append(run)


def key_array(digests: bytes) -> Keys:
    """[n, 2] of n 16-byte digests back to back."""
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def merge(runs: Sequence[tuple[int, Run]], memory: int) -> Iterator[tuple[Positions, Positions]]:
    """(first position, later position) arrays, one pair for each position whose key came before in its run, and one
    for each run after the first that has a key: linked through the earliest position of a run, each later position
    leads to the first of all.

    runs: (what to add to the positions of the run, run), in the order of their positions
    memory: bytes that a range of keys may take
    """
    for base, run in runs:
        repeats = np.load(run.repeats, mmap_mode="r")
        step = max(memory // 64, 1)
        for start in range(0, repeats.shape[1], step):
            part = repeats[:, start : start + step] + base
            yield part[0], part[1]
    if len(runs) < 2:
        return
    sizes = [np.load(run.path, mmap_mode="r").shape[1] for _, run in runs]
    ranges = sum(sizes) * MERGE_BYTES // max(memory, 1) + 1
    edges = np.array([(i << 64) // ranges for i in range(1, ranges)], np.uint64)
    bounds = [
        np.r_[0, np.searchsorted(np.load(run.path, mmap_mode="r")[0], edges), size]
        for (_, run), size in zip(runs, sizes, strict=True)
    ]
    for number in range(ranges):
        keys, positions = [], []
        for (base, run), bound in zip(runs, bounds, strict=True):
            # Opened anew for each range: as many open files as runs would be too many.
            part = np.load(run.path, mmap_mode="r")[:, bound[number] : bound[number + 1]]
            keys.append(np.array(part[:2]))
            positions.append(part[2].astype(np.int64) + base)
        repeats = _first_of_each(np.concatenate(keys, axis=1).T, np.concatenate(positions))[1]
        if repeats.size:
            yield repeats[0], repeats[1]


def remove(runs: Sequence[tuple[int, Run]]) -> None:
    for _, run in runs:
        Path(run.path).unlink()
        Path(run.repeats).unlink()


def _first_of_each(keys: Keys, positions: Positions) -> tuple[tuple[Any, Any, Positions], NDArray[np.int64]]:
    """((key, key, position) of the first of each key, sorted by key; rows (first, later) of the others).

    positions: ascending among equal keys
    """
    high, low = np.ascontiguousarray(keys[:, 0]), keys[:, 1]
    order = np.argsort(
        high
    )  # not stable: numpy's sort of whole words with vector instructions is the fastest
    high = high[order]
    same = high[1:] == high[:-1]
    tied = np.r_[False, same] | np.r_[same, False]
    if tied.any():  # equal first columns lie together; among them the order is by second column and position
        among = order[tied]
        order[tied] = among[np.lexsort((among, low[among], high[tied]))]
    low, positions = low[order], positions[order]
    new = np.r_[True, ~same | (low[1:] != low[:-1])] if len(order) else np.zeros(0, bool)
    firsts = np.flatnonzero(new)
    owner = np.cumsum(new) - 1
    later = np.flatnonzero(~new)
    repeats = np.stack([positions[firsts[owner[later]]], positions[later]]) if later.size else _NONE
    return (high[firsts], low[firsts], positions[firsts]), repeats


_NONE = np.zeros((2, 0), np.int64)
