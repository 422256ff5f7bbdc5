import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.checks import check_norm
from tests.csrc.emulation import DTYPES, compiled

DTYPE = st.sampled_from(list(DTYPES))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 12),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([64, 256, 768, 1032, 1281, 2048])),
    dtype=DTYPE,
    rms=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    workspace_rows=st.integers(1, 9),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norm(rows: int, cols: int, dtype: torch.dtype, **options: Any) -> None:
    check_norm(compiled("norm.cu"), rows, cols, dtype, **options)


@pytest.mark.parametrize(
    ("rows", "cols", "dtype", "offset"),
    [
        (3, 16384 + 520, torch.bfloat16, False),  # beyond the registers of the forward pass
        (3, 8192 + 4, torch.float32, False),  # of the backward pass
        (2, 4096 + 3, torch.float32, True),  # of both, one element at a time
        (150, 8, torch.float32, False),  # groups of one warp that walk over several rows
    ],
)
def test_norm_of_long_and_of_many_rows(rows: int, cols: int, dtype: torch.dtype, offset: bool) -> None:
    check_norm(compiled("norm.cu"), rows, cols, dtype, workspace_rows=2, offset=offset)
    check_norm(compiled("norm.cu"), rows, cols, dtype, rms=True, bias=False, residual=False, offset=offset)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rms", [False, True])
def test_bad_numbers_pass_through(spoil: float, rms: bool) -> None:
    check_norm(compiled("norm.cu"), 3, 40, torch.bfloat16, rms=rms, bias=not rms, spoil=spoil)
