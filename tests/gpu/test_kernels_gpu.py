"""The CUDA kernels of the built module on a GPU, by the checks that the emulator's tests make, at sizes of real models.

Needs the built module and torch, nothing else. Each call runs three times and must give the same bits.
"""

import math

import pytest
import torch

from megatron_lite.ops import _kernels
from tests.csrc import attention_check
from tests.csrc.attention_check import Drop, Sizes
from tests.csrc.checks import (
    check_activation,
    check_cross_entropy,
    check_dropout,
    check_norm,
    check_rotary,
    check_softmax,
)
from tests.csrc.emulation import DTYPES, EmulatorError, OnGpu

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def library() -> OnGpu:
    if not _kernels.cuda_compiled:
        pytest.skip("the kernels were built without CUDA: put nvcc on the path and build again (make setup)")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels need compute capability 8.0 (A100) or newer")
    return OnGpu(_kernels)


@dtypes
@pytest.mark.parametrize(
    ("rows", "cols", "offset"),
    [(0, 64, False), (3000, 128, False), (777, 768, True), (1500, 4096, False), (40, 20000, False)],
)
def test_norm(library: OnGpu, rows: int, cols: int, offset: bool, dtype: torch.dtype) -> None:
    for rms in (False, True):
        check_norm(library, rows, cols, dtype, rms=rms, bias=not rms, offset=offset, workspace_rows=200)
    if rows:
        check_norm(library, rows, cols, dtype, spoil=math.nan)


@dtypes
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (1000, 64), (700, 1281), (512, 8192)])
def test_activation(library: OnGpu, kind: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    for bias in (False, True):
        check_activation(library, kind, rows, cols, dtype, bias=bias, workspace_rows=100, in_place=bias)


@dtypes
@pytest.mark.parametrize("keys", [1, 77, 1024, 4096, 20000])
def test_softmax(library: OnGpu, keys: int, dtype: torch.dtype) -> None:
    check_softmax(library, (2, 3, 50, keys), dtype, causal=True, in_place=True)
    check_softmax(library, (2, 3, 20, keys), dtype, mask_heads=3, segments=True)


@dtypes
@pytest.mark.parametrize(
    ("rows", "cols", "slices"), [(3000, 64, 1), (300, 50304, 1), (64, 32064, 4), (99, 5001, 2)]
)
def test_cross_entropy(library: OnGpu, rows: int, cols: int, slices: int, dtype: torch.dtype) -> None:
    check_cross_entropy(library, rows, cols, dtype, slices=slices, padding=47, z_loss=1e-3)


@dtypes
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (40, 10), (96, 48)])
def test_rotary(library: OnGpu, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    for in_place in (False, True):
        check_rotary(library, (2, 300, 32, 8), head_dim, rotary_dim, dtype, in_place=in_place)


@dtypes
def test_dropout(library: OnGpu, dtype: torch.dtype) -> None:
    check_dropout(library, 16, 264, dtype, row_stride=1024, start=2**34)
    check_dropout(library, 16, 101, dtype, start=3)


@halves
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_attention_head_sizes(library: OnGpu, head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    attention_check.check(library, (2, 4, 2, 400, 400, head_dim), dtype, causal=causal)


@halves
@pytest.mark.parametrize("segments", [None, "documents", "mixed"])
@pytest.mark.parametrize("drop", [None, (0.1, 2**63 + 5, 3, 12)])
@pytest.mark.parametrize(
    "sizes",
    [(1, 8, 2, 1024, 1024, 128), (2, 6, 1, 777, 1500, 64), (1, 4, 4, 1001, 301, 128), (2, 2, 2, 1, 333, 64)],
)
def test_attention_masks(
    library: OnGpu, sizes: Sizes, drop: Drop | None, segments: str | None, dtype: torch.dtype
) -> None:
    attention_check.check(library, sizes, dtype, segments=segments, drop=drop)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_attention_dropout(library: OnGpu, head_dim: int) -> None:
    for keys in (512, 515):  # four keys to a random number's counter, or rows that begin within one
        attention_check.check(library, (2, 4, 2, 500, keys, head_dim), drop=(0.3, 7, 0, 4), causal=False)


def test_attention_passes_bad_numbers(library: OnGpu) -> None:
    for spoil in (math.nan, math.inf):
        attention_check.check(library, (1, 2, 2, 20, 20, 32), spoil=spoil)


def test_attention_does_not_serve_fp32(library: OnGpu) -> None:
    with pytest.raises(EmulatorError, match="error 801"):
        attention_check.check(library, (1, 2, 2, 20, 20, 32), torch.float32)


@pytest.mark.parametrize("name", ["gelu", "norm", "cross_entropy", "softmax"])
def test_more_elements_than_an_int_counts(library: OnGpu, name: str) -> None:
    """The last rows come out as they do alone."""
    rows, cols = 2**16 + 8, 2**15
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * cols:
        pytest.skip(f"needs {5 * 2 * rows * cols / 2**30:.0f} GiB of GPU memory")
    x = torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda")
    weight = torch.rand(cols, dtype=torch.bfloat16, device="cuda")

    def run(x: torch.Tensor) -> torch.Tensor:
        rows, y = len(x), torch.zeros_like(x)
        labels = torch.arange(rows, device="cuda")
        stats = torch.zeros(3, rows, device="cuda")
        if name == "gelu":
            given = ["bias_gelu_forward", torch.bfloat16, True, rows, cols, x, weight, y]
        elif name == "norm":
            given = [
                "norm_forward",
                torch.bfloat16,
                True,
                rows,
                cols,
                1e-5,
                x,
                None,
                weight,
                None,
                y,
                None,
                None,
                stats,
            ]
        elif name == "softmax":
            sizes = (1, 1, rows, cols)
            given = [
                "softmax_forward",
                torch.bfloat16,
                *sizes,
                1.0,
                x,
                None,
                0,
                0,
                0,
                0,
                None,
                None,
                False,
                y,
            ]
        else:
            given = ["cross_entropy_stats", torch.bfloat16, rows, cols, cols, 0, x, labels % cols, *stats]
        library.call(*given, schedules=(0,))
        return y if name != "cross_entropy" else stats[:2].mT

    # 2^31 elements lie before the last eight rows.
    assert torch.equal(run(x)[-8:], run(x[-8:].clone()))
