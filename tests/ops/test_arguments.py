"""The runs of documents, as kernels for packed sequences take them, against a walk over the tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.ops import Documents


def walk(keys: list[list[int]], s: int) -> tuple[list[int], list[int]]:
    """Tokens of each run: queries, keys."""
    queries, totals = [], []
    for row in keys:
        last = None
        for column, number in enumerate(row):
            if number != last:
                queries.append(0)
                totals.append(0)
            totals[-1] += 1
            queries[-1] += column >= len(row) - s
            last = number
    return queries, totals


@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), t=st.integers(1, 9))
def test_runs(data: st.DataObject, rows: int, t: int) -> None:
    numbers = st.lists(st.integers(-1, 2), min_size=t, max_size=t)
    keys = data.draw(st.lists(numbers, min_size=rows, max_size=rows))
    s = data.draw(st.integers(1, t))
    whole = torch.tensor(keys, dtype=torch.int32)
    runs = Documents(whole[:, t - s :].contiguous(), whole).runs
    queries, totals = walk(keys, s)
    assert runs.queries.dtype == runs.keys.dtype == torch.int32
    assert (runs.queries[0], runs.keys[0]) == (0, 0)
    assert (runs.queries.diff().tolist(), runs.keys.diff().tolist()) == (queries, totals)
    assert (runs.longest_queries, runs.longest_keys) == (max(queries), max(totals))
