"""The CPU allocator: freed memory stays in the process, and a C library that is not glibc is left alone."""

import ctypes
import platform
import resource
from pathlib import Path

import pytest
import torch

from megatron_lite.training.allocator import set_cpu_allocator
from tests.distributed import run_ranks

SIZE = 64 << 20  # bytes: glibc maps blocks like this afresh each time
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def in_huge_pages() -> int:
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) << 10 for row in rows if row.startswith("AnonHugePages"))


def heap() -> int:
    """Addresses of the heap, used or not."""
    rows = [row.split()[0] for row in Path("/proc/self/maps").read_text().splitlines() if "[heap]" in row]
    return sum(int(end, 16) - int(start, 16) for start, end in (row.split("-") for row in rows))


def kept_after_freeing(tune: bool) -> int:
    """How much larger the process stays for a large tensor that is gone."""
    if tune:
        assert set_cpu_allocator()
    before = resident()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    assert resident() - before > SIZE // 2
    del tensor
    return resident() - before


@glibc
def test_freed_memory_stays() -> None:
    (without,), (kept,) = run_ranks(1, kept_after_freeing, False), run_ranks(1, kept_after_freeing, True)
    assert without < SIZE // 2 < kept


def heap_after_freeing(size: int) -> tuple[int, int]:
    assert set_cpu_allocator()
    before, libc = resident(), ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(size))  # the heap's last block, not touched
    return heap(), resident() - before


@glibc
def test_a_heap_of_many_gigabytes_stays() -> None:
    """With the largest threshold that mallopt takes it would be given back whenever 2 GB were free at its end."""
    ((addresses, used),) = run_ranks(1, heap_after_freeing, 3 << 30)
    assert addresses > 3 << 30
    assert used < SIZE


def huge_pages_of_a_tensor() -> int:
    assert set_cpu_allocator()
    before = in_huge_pages()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    return in_huge_pages() - before if len(tensor) else 0


@glibc
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has no huge pages"
)
def test_tensors_are_in_huge_pages() -> None:
    assert run_ranks(1, huge_pages_of_a_tensor)[0] > 0


def heap_under_a_limit() -> int:
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))
    before = heap()
    assert set_cpu_allocator()
    return heap() - before


@glibc
def test_no_addresses_are_taken_where_they_count() -> None:
    """A limit on them would be spent before the first tensor."""
    assert run_ranks(1, heap_under_a_limit)[0] < 1 << 30


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert set_cpu_allocator() is False
