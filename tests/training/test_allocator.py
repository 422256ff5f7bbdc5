"""The CPU allocator: freed memory stays in the process, and a C library that is not glibc is left alone."""

import platform
from pathlib import Path

import pytest
import torch

from megatron_lite.training.allocator import set_cpu_allocator
from tests.distributed import run_ranks

SIZE = 64 << 20  # bytes: glibc maps blocks like this afresh each time


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def kept_after_freeing(tune: bool) -> int:
    """How much larger the process stays for a large tensor that is gone."""
    if tune:
        assert set_cpu_allocator()
    before = resident()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    assert resident() - before > SIZE // 2
    del tensor
    return resident() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays() -> None:
    (without,), (kept,) = run_ranks(1, kept_after_freeing, False), run_ranks(1, kept_after_freeing, True)
    assert without < SIZE // 2 < kept


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert set_cpu_allocator() is False
