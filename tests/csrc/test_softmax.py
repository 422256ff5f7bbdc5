import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.checks import check_softmax
from tests.csrc.emulation import DTYPES, compiled


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.one_of(st.integers(1, 40), st.sampled_from([64, 1032, 1281])),
    dtype=st.sampled_from(list(DTYPES)),
    causal=st.booleans(),
    masked=st.sampled_from([None, "one", "all"]),
    segments=st.booleans(),
    offset=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
def test_softmax(
    batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype, masked: str | None, **options: Any
) -> None:
    mask_heads = {None: None, "one": 1, "all": heads}[masked]
    check_softmax(
        compiled("softmax.cu"), (batch, heads, queries, keys), dtype, mask_heads=mask_heads, **options
    )


@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [
        (3, 16384 + 520, False),  # beyond the registers
        (3, 4096 + 3, True),  # the same, one element at a time
        (90, 12, False),  # groups of one warp that walk over several rows
    ],
)
def test_softmax_of_long_and_of_many_rows(queries: int, keys: int, offset: bool) -> None:
    check_softmax(compiled("softmax.cu"), (1, 2, queries, keys), torch.bfloat16, causal=True, offset=offset)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
def test_bad_numbers_pass_through(spoil: float) -> None:
    check_softmax(compiled("softmax.cu"), (1, 2, 3, 5), torch.float32, spoil=spoil)
    check_softmax(compiled("softmax.cu"), (1, 2, 3, 1), torch.float32, spoil=spoil)
