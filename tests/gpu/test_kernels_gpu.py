"""The CUDA kernels on a GPU, by the checks that the emulator's tests make, at sizes of real models. Needs nvcc.

Each call runs three times and must give the same bits.
"""

import math
import shutil

import pytest
import torch

from tests.csrc.checks import (
    check_activation,
    check_cross_entropy,
    check_dropout,
    check_norm,
    check_rotary,
    check_softmax,
)
from tests.csrc.emulation import DTYPES, built_by_nvcc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path"),
]
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)


@dtypes
@pytest.mark.parametrize(
    ("rows", "cols", "offset"),
    [(0, 64, False), (3000, 128, False), (777, 768, True), (1500, 4096, False), (40, 20000, False)],
)
def test_norm(rows: int, cols: int, offset: bool, dtype: torch.dtype) -> None:
    for rms in (False, True):
        check_norm(
            built_by_nvcc("norm.cu"),
            rows,
            cols,
            dtype,
            rms=rms,
            bias=not rms,
            offset=offset,
            workspace_rows=200,
        )
    if rows:
        check_norm(built_by_nvcc("norm.cu"), rows, cols, dtype, spoil=math.nan)


@dtypes
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (1000, 64), (700, 1281), (512, 8192)])
def test_activation(kind: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    for bias in (False, True):
        check_activation(
            built_by_nvcc("activations.cu"),
            kind,
            rows,
            cols,
            dtype,
            bias=bias,
            workspace_rows=100,
            in_place=bias,
        )


@dtypes
@pytest.mark.parametrize("keys", [1, 77, 1024, 4096, 20000])
def test_softmax(keys: int, dtype: torch.dtype) -> None:
    library = built_by_nvcc("softmax.cu")
    check_softmax(library, (2, 3, 50, keys), dtype, causal=True, in_place=True)
    check_softmax(library, (2, 3, 20, keys), dtype, mask_heads=3, segments=True)


@dtypes
@pytest.mark.parametrize(
    ("rows", "cols", "slices"), [(3000, 64, 1), (300, 50304, 1), (64, 32064, 4), (99, 5001, 2)]
)
def test_cross_entropy(rows: int, cols: int, slices: int, dtype: torch.dtype) -> None:
    check_cross_entropy(
        built_by_nvcc("cross_entropy.cu"), rows, cols, dtype, slices=slices, padding=47, z_loss=1e-3
    )


@dtypes
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (40, 10), (96, 48)])
def test_rotary(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    for in_place in (False, True):
        check_rotary(
            built_by_nvcc("rotary.cu"), (2, 300, 32, 8), head_dim, rotary_dim, dtype, in_place=in_place
        )


@dtypes
def test_dropout(dtype: torch.dtype) -> None:
    check_dropout(built_by_nvcc("dropout.cu"), 16, 264, dtype, row_stride=1024, start=2**34)
    check_dropout(built_by_nvcc("dropout.cu"), 16, 101, dtype, start=3)
