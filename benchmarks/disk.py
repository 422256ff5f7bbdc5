"""The disk's own sequential rates: one plain file, several large blocks at a time, past the page cache.

As `fio --direct=1 --bs=2m --iodepth=4` would. Through the cache the same disk is slower on most machines, on virtual
ones several times: there the pages of the cache are what is measured.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 1 << 21
_AT_ONCE = 4


def write_seconds(path: Path, size: int) -> float:
    """Until the disk has a new file of about `size` bytes."""
    noise = os.urandom(_BLOCK)  # what a disk might compress or leave out were no measure
    path.touch()
    return _timed(path, os.O_WRONLY, size, noise, lambda file, block, at: os.pwrite(file, block, at))


def read_seconds(path: Path) -> float:
    """For a file that `write_seconds` made."""
    size = path.stat().st_size
    return _timed(path, os.O_RDONLY, size, b"", lambda file, block, at: os.preadv(file, [block], at))


def _timed(
    path: Path, flags: int, size: int, content: bytes, move: Callable[[int, mmap.mmap, int], int]
) -> float:
    file = os.open(path, flags | os.O_DIRECT)
    blocks = [mmap.mmap(-1, _BLOCK) for _ in range(_AT_ONCE)]
    for block in blocks:
        block[: len(content)] = content

    def work(first: int) -> None:
        for number in range(first, -(-size // _BLOCK), _AT_ONCE):
            count = move(file, blocks[first], number * _BLOCK)
            assert count == _BLOCK, f"{path}: the disk took or gave {count} bytes of a block"

    begun = time.perf_counter()
    if flags == os.O_WRONLY:
        os.posix_fallocate(file, 0, -(-size // _BLOCK) * _BLOCK)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(work, range(_AT_ONCE)))
    if flags == os.O_WRONLY:
        os.fsync(file)
    os.close(file)
    return time.perf_counter() - begun


def drop(path: Path) -> None:
    """Its pages out of the page cache, so that reading it is reading the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
