"""The CUDA attention: on the emulator against float64, and through nvcc."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.attention_check import SOURCES, Drop, Sizes, check, given_strides, philox
from tests.csrc.checks import philox_words
from tests.csrc.emulation import CSRC, EmulatorError, compiled


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check(compiled(*SOURCES), (1, 2, 1, 45, 70, head_dim), dtype)


@pytest.mark.parametrize("segments", [None, "documents", "mixed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [(150, 150), (40, 203), (203, 40)]
)  # tiles of queries and keys: several, one
def test_masks(lengths: tuple[int, int], causal: bool, segments: str | None) -> None:
    check(compiled(*SOURCES), (1, 1, 1, *lengths, 64), causal=causal, segments=segments)


@pytest.mark.parametrize("lengths", [(50, 1300), (1300, 50)])
def test_long_stretches_of_other_documents(lengths: tuple[int, int]) -> None:
    check(compiled(*SOURCES), (1, 1, 1, *lengths, 32), causal=False, segments="documents")


@pytest.mark.parametrize("drop", [(0.1, 2**63 + 5, 3, 12), (0.5, 7, 0, 2), (1.0, 7, 0, 2), (1e-12, 7, 0, 2)])
@pytest.mark.parametrize("keys", [104, 101])  # four keys to a counter, or rows that begin within one
def test_dropout(keys: int, drop: Drop) -> None:
    check(compiled(*SOURCES), (2, 2, 1, 70, keys, 32), drop=drop)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_dropout_of_large_heads(head_dim: int) -> None:
    """In other tiles; with documents, of which some tiles are left out."""
    check(compiled(*SOURCES), (1, 1, 1, 60, 132, head_dim), drop=(0.2, 5, 1, 3), segments="documents")


def test_the_reference_draws_the_numbers_of_the_paper() -> None:
    """The reference of `dropout` has them one by one."""
    numbers = [0, 1, 2**32 - 1, 2**32, 2**62 + 12345]
    for seed in (0, 2**64 - 3):
        drawn = philox(seed, np.array(numbers, np.uint64))
        assert drawn.tolist() == [philox_words(seed, number) for number in numbers]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 140),
    head_dim=st.integers(1, 16).map(lambda eighths: 8 * eighths),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    segments=st.sampled_from([None, "documents", "mixed"]),
    drop=st.sampled_from([None, None, (0.2, 99, 5, 11)]),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    batch: int,
    groups: int,
    shared: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    segments: str | None,
    drop: Drop | None,
    size: float,
    seed: int,
) -> None:
    sizes = (batch, groups * shared, groups, queries, keys, head_dim)
    # The gradient is taken through the rounded output, as in FlashAttention-2: where probabilities are peaked, their
    # gradients cancel to less than its rounding, and plain torch, which keeps the probabilities, is closer.
    backward = size <= 1
    check(
        compiled(*SOURCES),
        sizes,
        dtype,
        causal=causal,
        segments=segments,
        drop=drop,
        size=size,
        backward=backward,
        seed=seed,
    )


NO_DROPOUT = (0.0, 0, 0, 0)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 7, 64), (1, 2, 1, 0, 7, 64), (1, 2, 1, 5, 0, 64)])
def test_empty(sizes: Sizes) -> None:
    """No query: zero gradients of keys and values; no key: zero output."""
    batch, heads, groups, queries, keys, head_dim = sizes
    q, k = (
        torch.ones(batch, heads, queries, head_dim).half(),
        torch.ones(batch, groups, keys, head_dim).half(),
    )
    o, lse = torch.full_like(q, 7), torch.zeros(batch, heads, queries)
    dq, dk, dv = torch.full_like(q, 7), torch.full_like(k, 7), torch.full_like(k, 7)
    problem = [torch.float16, *sizes, 1.0, True, *given_strides([q, k, k]), None, None, *NO_DROPOUT]
    compiled(*SOURCES).call("attention_forward", *problem, *given_strides([o]), lse)
    strided = [*given_strides([o]), lse, *given_strides([q, dq, dk, dv])]
    workspace = torch.zeros(
        compiled(*SOURCES).number("attention_workspace", batch, heads, queries, head_dim) // 4
    )
    compiled(*SOURCES).call("attention_backward", *problem, *strided, workspace)
    assert not any(x.any() for x in (o, dq, dk, dv))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_bad_numbers_pass_through(spoil: float) -> None:
    check(compiled(*SOURCES), (1, 2, 2, 20, 20, 32), spoil=spoil)


INVALID, MISALIGNED, UNSUPPORTED = 1, 716, 801


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dtype": torch.float32}, UNSUPPORTED),
        ({"head_dim": 12}, INVALID),
        ({"head_dim": 264}, INVALID),
        ({"groups": 3}, INVALID),
        ({"groups": 0}, INVALID),
        ({"scale": 0.0}, INVALID),
        ({"scale": math.nan}, INVALID),
        ({"segments_q": torch.zeros(1, 5, dtype=torch.int32)}, INVALID),
        ({"dropout_p": 1.5}, INVALID),
        ({"dropout_p": math.nan}, INVALID),
        ({"dropout_p": 0.1, "dropout_head": 3}, INVALID),
        ({"k_strides": (0, 0, 12)}, MISALIGNED),
        ({"o": torch.zeros(5 * 2 * 16 + 1).half()[1:]}, MISALIGNED),
    ],
)
def test_refuses(change: dict[str, object], error: int) -> None:
    q = torch.zeros(1, 2, 5, 16).half()
    sizes = {"batch": 1, "heads": 2, "groups": 2, "queries": 5, "keys": 5, "head_dim": 16}
    problem = {"dtype": torch.float16, **sizes, "scale": 1.0, "causal": False}
    tensors = {
        name: x for t in "qkv" for name, x in zip((t, f"{t}_strides"), given_strides([q]), strict=True)
    }
    o, o_strides = given_strides([q.clone()])
    masks = {"segments_q": None, "segments_k": None}
    dropout = {"dropout_p": 0.0, "dropout_seed": 0, "dropout_head": 0, "dropout_heads": 4}
    results = {"o": o, "o_strides": o_strides, "lse": torch.zeros(10)}
    arguments = problem | tensors | masks | dropout | results
    assert arguments.keys() >= change.keys()
    with pytest.raises(EmulatorError, match=f"error {error}:"):
        compiled(*SOURCES).call("attention_forward", *(arguments | change).values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str, architecture: str, tmp_path: Path) -> None:
    """Every head size keeps its tiles in registers; `pytest -rP` prints how many."""
    flags = [
        "-std=c++17",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-Xcompiler=-Wall,-Werror",
    ]
    command = [
        "nvcc",
        *flags,
        "-Xptxas=-v",
        "-c",
        str(CSRC / "cuda" / source),
        "-o",
        str(tmp_path / "object.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    kernels = re.findall(
        r"Compiling entry function '\w*mlite\d+(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    for name, *_, registers in kernels:
        print(f"sm_{architecture} {name}: {registers} registers")
    assert (
        len(kernels) == {"attention_forward.cu": 14, "attention_backward.cu": 30}[source]
    )  # seven sizes, two types (and two passes, and delta)
    assert not [kernel for kernel in kernels if any(int(count) for count in kernel[1:4])]
