"""glibc's allocator, set so that large tensors are reused instead of being mapped afresh, in huge pages."""

import ctypes
import os
import platform
import resource
from pathlib import Path

# Parameters of mallopt(3), and of madvise(2).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MADV_HUGEPAGE = 14

_MEGABYTE = 1 << 20
_HUGE_PAGE = 2 * _MEGABYTE


def set_cpu_allocator() -> bool:
    """Keeps freed memory in the process; call before the first large tensor.

    glibc gives blocks over 32 MB back to the system when they are freed, and the page faults of taking them again
    cost more than the arithmetic on them. The price is resident memory that does not shrink.

    Returns:
        False where the C library is not glibc, and nothing was changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 * _MEGABYTE}  # -1: it never shrinks
    done = all(libc.mallopt(parameter, value) for parameter, value in settings.items())
    if done and _may_reserve():
        _reserve_in_huge_pages(libc)
    return done


def _may_reserve() -> bool:
    """Whether addresses alone cost nothing here: neither the system nor a limit counts them as memory."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    policy = Path("/proc/sys/vm/overcommit_memory")
    strict = policy.exists() and policy.read_text().strip() == "2"
    return not strict and all(limit == resource.RLIM_INFINITY for limit in limits)


def _reserve_in_huge_pages(libc: ctypes.CDLL) -> None:
    """Lets the heap grow, in addresses only, to half the machine's memory, and asks for huge pages there.

    A heap that grows bit by bit would have ordinary pages, whose translation takes time in every pass over a tensor.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)
    if block is None:
        return
    libc.free(block)  # it stays part of the heap
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
