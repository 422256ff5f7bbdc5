from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.checks import check_rotary
from tests.csrc.emulation import DTYPES, compiled


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    seq=st.integers(0, 5),
    heads_q=st.integers(1, 9),
    heads_k=st.integers(0, 5),
    head_dim=st.sampled_from([2, 6, 16, 40, 64, 128]),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dtype=st.sampled_from(list(DTYPES)),
    tables=st.booleans(),
    in_place=st.booleans(),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotary(
    batch: int,
    seq: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    share: float,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    rotary_dim = int(head_dim * share) // 2 * 2
    check_rotary(
        compiled("rotary.cu"), (batch, seq, heads_q, heads_k), head_dim, rotary_dim, dtype, **options
    )


def test_rotary_with_more_heads_than_a_block_takes() -> None:
    check_rotary(compiled("rotary.cu"), (1, 2, 37, 9), 128, 128, torch.bfloat16)
