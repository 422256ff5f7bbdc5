import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.checks import check_activation
from tests.csrc.emulation import DTYPES, compiled

KINDS = ["gelu", "gelu_tanh", "swiglu"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.one_of(st.integers(0, 40), st.just(300)),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([64, 520, 1281])),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
    workspace_rows=st.integers(1, 9),
    offset=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
def test_activation(kind: str, rows: int, cols: int, dtype: torch.dtype, **options: Any) -> None:
    check_activation(compiled("activations.cu"), kind, rows, cols, dtype, **options)


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_numbers_pass_through(kind: str, spoil: float) -> None:
    check_activation(compiled("activations.cu"), kind, 3, 24, torch.bfloat16, bias=False, spoil=spoil)
