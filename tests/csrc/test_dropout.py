import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.checks import check_dropout, philox_words
from tests.csrc.emulation import DTYPES, compiled


def test_the_reference_gives_the_published_words() -> None:
    assert philox_words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 7),
    cols=st.one_of(st.integers(1, 40), st.just(264)),
    dtype=st.sampled_from(list(DTYPES)),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]),
    row_stride=st.sampled_from([None, 264, 301]),
    start=st.sampled_from([0, 3, 8, 2**34 - 5, 2**40 + 4]),
    dropout_seed=st.integers(0, 2**64 - 1),
    offset=st.booleans(),
)
def test_dropout(rows: int, cols: int, dtype: torch.dtype, **options: Any) -> None:
    check_dropout(compiled("dropout.cu"), rows, cols, dtype, **options)


def test_bad_numbers_pass_through_where_dropped_too() -> None:
    x, y = torch.full((1, 64), math.nan), torch.zeros(1, 64)
    compiled("dropout.cu").call("dropout", torch.float32, 1, 64, 64, 0, 0.5, 1, x, y)
    assert y.isnan().all()
