"""Bugs planted in the kernels, one at a time, are caught by the checks that the other tests make."""

import math
from collections.abc import Callable

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
from tests.csrc.emulation import Library, compiled

F32, BF16 = torch.float32, torch.bfloat16


def norms(library: Library) -> None:
    check_norm(library, 7, 200, F32, workspace_rows=2)
    check_norm(library, 9, 24, BF16, workspace_rows=9)
    check_norm(library, 5, 2056, F32, workspace_rows=2)
    check_norm(library, 5, 5000, F32, rms=True, bias=False, offset=True, workspace_rows=2)
    check_norm(library, 3, 36, BF16, rms=True, bias=False, residual=False)


def activations(library: Library) -> None:
    for kind in ("gelu", "gelu_tanh", "swiglu"):
        check_activation(library, kind, 21, 24, BF16)
        check_activation(library, kind, 21, 26, BF16, in_place=True)
        check_activation(library, kind, 0, 24, BF16)


def softmax(library: Library) -> None:
    check_softmax(library, (2, 3, 5, 40), F32, causal=True)
    check_softmax(library, (2, 3, 5, 2056), BF16, mask_heads=1)
    check_softmax(library, (2, 3, 5, 9), F32, mask_heads=3, segments=True)


def cross_entropy(library: Library) -> None:
    check_cross_entropy(library, 5, 24, BF16, slices=3, padding=30, z_loss=1e-2)
    check_cross_entropy(library, 3, 2056, F32, padding=3)
    check_cross_entropy(library, 2, 20, F32, padding=3, spoil=math.nan)
    check_cross_entropy(library, 2, 2500, F32, offset=True)  # several steps of the running maximum


def rotary(library: Library) -> None:
    check_rotary(library, (2, 3, 9, 2), 40, 32, BF16)
    check_rotary(library, (2, 3, 37, 9), 64, 64, F32, tables=True, in_place=True)


def dropout(library: Library) -> None:
    check_dropout(library, 3, 24, BF16, row_stride=40, start=2**34)
    check_dropout(library, 3, 7, F32, start=3)


CHECKS: dict[str, Callable[[Library], None]] = {
    "norm.cu": norms,
    "activations.cu": activations,
    "softmax.cu": softmax,
    "cross_entropy.cu": cross_entropy,
    "rotary.cu": rotary,
    "dropout.cu": dropout,
}

BUGS = {
    "no barrier in a reduction": (
        "norm.cu", "rows.cuh", "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < N", "  for (int i = 0; i < N"
    ),
    "one scratch area for all reductions": ("norm.cu", "rows.cuh", "phase ^= 1;", ""),
    "a reduction over half a warp": ("norm.cu", "rows.cuh", "lanes = kWarp / 2", "lanes = kWarp / 4"),
    "a reduction that leaves the last warp out": ("norm.cu", "rows.cuh", "warp < warps", "warp < warps - 1"),
    "no barrier in the column sums": (
        "activations.cu", "rows.cuh", "= sum;\n  __syncthreads();", "= sum;"
    ),
    "a shuffle with half a warp's mask": ("norm.cu", "rows.cuh", "kAllLanes, value[i]", "0xffffu, value[i]"),
    "a barrier that a part of the block skips": (
        "norm.cu", "rows.cuh", "if (warps == 1) return;", "if (warps == 1 || threadIdx.x >= kWarp) return;"
    ),
    "a long row's tail begins one tile late": (
        "norm.cu", "rows.cuh", "    read(value, col);\n    visit(value, col);\n  }\n}\n\n// The same",
        "    if (col < cols - kVector) { read(value, col);\n    visit(value, col); }\n  }\n}\n\n// The same",
    ),
    "the workspace is read before its first writing": ("norm.cu", "norm.cu", "first ? more[i] : ", ""),
    "the residual's gradient is forgotten": ("norm.cu", "norm.cu", "dsum ? gradient + out[i] : gradient", "gradient"),
    "wide accesses to rows of odd length": ("norm.cu", "norm.cu", "cols % kVector == 0 && aligned(x,", "aligned(x,"),
    "wide accesses to misaligned pointers": (
        "norm.cu", "norm.cu", "cols % kVector == 0 && aligned(dy, dsum, x, weight, dx, workspace)",
        "cols % kVector == 0",
    ),
    "a row too many": (
        "activations.cu", "columns.cuh", "if (row + i * step < rows) finish", "if (row + i * step <= rows) finish"
    ),
    "two walks share a partial sum": (
        "activations.cu", "columns.cuh", "int64_t(blockIdx.y) * blockDim.y + threadIdx.y; }", "threadIdx.y; }"
    ),
    "causal off by one": ("softmax.cu", "softmax.cu", "query + keys - queries + 1", "query + keys - queries"),
    "causal from the first key": ("softmax.cu", "softmax.cu", "query + keys - queries + 1", "query + 1"),
    "the mask of the first head": ("softmax.cu", "softmax.cu", "head * see.mask_h", "0 * see.mask_h"),
    "documents see into the next": (
        "softmax.cu", "softmax.cu", "segments[key + i] == segment", "segments[key + i] <= segment"
    ),
    "the softmax of the row before": ("softmax.cu", "softmax.cu", "y + row * keys + key, out", "y + key, out"),
    "padding is a token": (
        "cross_entropy.cu", "cross_entropy.cu", "if (col + i >= valid) result", "if (col + i > valid) result"
    ),
    "padding gets a gradient": (
        "cross_entropy.cu", "cross_entropy.cu", "if (col + i >= valid) out.set", "if (col + i > valid) out.set"
    ),
    "the label's gradient is another's": (
        "cross_entropy.cu", "cross_entropy.cu", "if (col + i == label)", "if (col + i == label + 1)"
    ),
    "the neighbour's label": ("cross_entropy.cu", "cross_entropy.cu", "label < valid ?", "label <= valid ?"),
    "empty slices combine to NaN": (
        "cross_entropy.cu", "cross_entropy.cu", "mine[0] == largest ? 1.0f : expf", "false ? 1.0f : expf"
    ),
    "sums are not rescaled": (
        "cross_entropy.cu", "cross_entropy.cu", "if (largest > total[0]) total[1] *=", "if (false) total[1] *="
    ),
    "the inverse turns the same way": ("rotary.cu", "rotary.cu", "inverse ? -n[i] : n[i]", "n[i]"),
    "the sine of the wrong half": ("rotary.cu", "rotary.cu", "inverse ? 1 - part : part", "part"),
    "the table of the first batch entry": ("rotary.cu", "rotary.cu", "cos_table + b * table_stride_b", "cos_table"),
    "features that pass are left out": ("rotary.cu", "rotary.cu", "if (in != out) store", "if (false) store"),
    "nine rounds": ("dropout.cu", "philox.cuh", "round < 10", "round < 9"),
    "the index in the slice, not the global one": (
        "dropout.cu", "dropout.cu", "offset + row * row_stride", "row * cols"
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", list(CHECKS))
def test_the_checks_pass_without_a_bug(source: str) -> None:
    CHECKS[source](compiled(source))


@pytest.mark.parametrize("bug", list(BUGS))
def test_the_bug_is_caught(bug: str) -> None:
    source, file, old, new = BUGS[bug]
    library = compiled(source, edits=((file, old, new),))
    with pytest.raises(AssertionError):
        CHECKS[source](library)
