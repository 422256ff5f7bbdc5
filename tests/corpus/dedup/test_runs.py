from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.corpus.dedup.runs import RunWriter, merge, remove

FEW_KEYS = st.lists(st.tuples(st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.integers(0, 2)), max_size=60)


def first_positions(keys: list[tuple[int, int]]) -> list[int]:
    seen: dict[tuple[int, int], int] = {}
    return [seen.setdefault(key, position) for position, key in enumerate(keys)]


def resolved(pairs: list[tuple[np.ndarray, np.ndarray]], count: int) -> list[int]:
    parents = np.arange(count)
    for first, later in pairs:
        assert (first < later).all() and (parents[later] == later).all(), (
            "one parent each, and an earlier one"
        )
        parents[later] = first
    for position in range(count):
        parents[position] = parents[parents[position]]
    return parents.tolist()


@given(keys=FEW_KEYS, pieces=st.integers(1, 4), limit=st.integers(1, 70), memory=st.integers(1, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_every_key_leads_to_its_first_position(
    tmp_path: Path, keys: list[tuple[int, int]], pieces: int, limit: int, memory: int
) -> None:
    array = np.array(keys, np.uint64).reshape(-1, 2)
    edges = [len(keys) * piece // pieces for piece in range(pieces + 1)]
    runs = []
    for piece in range(pieces):
        writer = RunWriter(tmp_path, f"piece-{piece}", limit)
        part = array[edges[piece] : edges[piece + 1]]
        for start in range(0, len(part), 7):
            writer.add(part[start : start + 7], np.arange(len(part))[start : start + 7])
        runs += [(edges[piece], run) for run in writer.finish()]
    assert resolved(list(merge(runs, memory)), len(keys)) == first_positions(keys)
    remove(runs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [1000, 1 << 30])
def test_many_random_keys(tmp_path: Path, memory: int) -> None:
    random = np.random.default_rng(1)
    array = random.integers(0, 2**64, (300, 2), np.uint64)[random.integers(0, 300, 2000)]
    runs = []
    for start in range(0, 2000, 500):
        writer = RunWriter(tmp_path, f"{start}", 64)
        writer.add(array[start : start + 500], np.arange(500))
        runs += [(start, run) for run in writer.finish()]
    assert len(runs) == 32
    expected = first_positions([tuple(key) for key in array.tolist()])
    assert resolved(list(merge(runs, memory)), 2000) == expected
