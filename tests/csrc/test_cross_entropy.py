import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.checks import check_cross_entropy
from tests.csrc.emulation import DTYPES, compiled


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9),
    cols=st.one_of(st.integers(2, 40), st.sampled_from([64, 1032, 1281, 4000])),
    dtype=st.sampled_from(list(DTYPES)),
    slices=st.integers(1, 3),
    share=st.floats(0, 1),
    z_loss=st.sampled_from([0.0, 1e-2]),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cross_entropy(
    rows: int, cols: int, dtype: torch.dtype, slices: int, share: float, **options: Any
) -> None:
    padding = int(share * (slices * cols - 1))  # the last slices may be all padding
    check_cross_entropy(
        compiled("cross_entropy.cu"), rows, cols, dtype, slices=slices, padding=padding, **options
    )


@pytest.mark.parametrize(("rows", "cols"), [(5, 16384 + 8), (5, 2051), (150, 9)])
def test_cross_entropy_of_long_and_of_many_rows(rows: int, cols: int) -> None:
    check_cross_entropy(compiled("cross_entropy.cu"), rows, cols, torch.bfloat16, padding=3)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
def test_bad_numbers_pass_through(spoil: float, whole_row: bool, offset: bool) -> None:
    check_cross_entropy(
        compiled("cross_entropy.cu"), 3, 40, torch.float32, slices=2, padding=5, spoil=spoil, whole_row=whole_row,
        offset=offset,
    )  # fmt: skip
