"""Ranges of a file, read in blocks: into a tensor, or for their checksum."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_lite.checkpoint.blocks import SECTOR, Bytes, crc32, is_direct, set_direct

_BLOCK = 1 << 21  # bytes read at a time, and then summed or cast: they stay in the processor's cache
_LARGE = 1 << 20  # bytes; less is read through the page cache, since the disk is waited for each time

_own = threading.local()


def read_values(
    path: Path, begin: int, dtype: torch.dtype, out: torch.Tensor, *, summed: bool, past_cache: bool = False
) -> int:
    """Fill `out`, 1-D, of any device and type, with values of `dtype` from byte `begin` of a file on.

    Args:
        summed: return the CRC-32 of their bytes.
        past_cache: for what nobody reads again soon: no page cache is filled with it, which takes longer than reading
            on some machines, and pushes out what others read.

    Raises OSError where the file cannot be read, or ends before.
    """
    in_place = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
    target: Bytes | None = out.view(torch.uint8).numpy() if in_place else None
    crc = done = 0
    for block in _blocks(path, begin, out.numel() * dtype.itemsize, target, past_cache):
        if summed:
            crc = crc32(block.data, crc)
        if not in_place:
            values = torch.from_numpy(block).view(dtype)
            out[done : done + values.numel()].copy_(values)
            done += values.numel()
    return crc


def crc_of_range(path: Path, begin: int, size: int) -> int:
    """CRC-32 of bytes [begin, begin + size) of a file. Raises OSError where it cannot be read, or ends before."""
    crc = 0
    for block in _blocks(path, begin, size, None, past_cache=False):
        crc = crc32(block.data, crc)
    return crc


def _blocks(path: Path, begin: int, size: int, out: Bytes | None, past_cache: bool) -> Iterator[Bytes]:
    """Bytes [begin, begin + size) of a file, block after block, also in `out`; the next may overwrite the last."""
    # Opened each time, because threads that share a descriptor spoil one another's read-ahead.
    file, done = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        past_cache = past_cache and size >= _LARGE and set_direct(file, True)
        while done < size:
            if out is None or past_cache:
                block = _aligned(file, begin + done, size - done)
                if out is not None:
                    np.copyto(out[done : done + block.size], block)
            else:
                block = out[done : done + _BLOCK]
                _fill(file, block, begin + done, block.size)
            done += block.size
            yield block
    finally:
        os.close(file)


def _aligned(file: int, at: int, size: int) -> Bytes:
    """The bytes from `at` on, `size` or as many as a block has, read as what goes past the cache must be."""
    if not hasattr(_own, "block"):
        _own.block = np.frombuffer(mmap.mmap(-1, _BLOCK), np.uint8)
    first = at % SECTOR
    last = min(first + size, _own.block.size)
    _fill(file, _own.block[: -(-last // SECTOR) * SECTOR], at - first, last)
    part: Bytes = _own.block[first:last]
    return part


def _fill(file: int, block: Bytes, at: int, least: int) -> None:
    """Read a block from `at` on, of which the file must have the `least` bytes."""
    got = -1
    while True:
        try:
            count = os.preadv(file, [block.data], at)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct(file):
                raise
            set_direct(file, False)  # a file system that wants another alignment
            continue
        if count >= least:
            return
        if count <= got:
            raise OSError(f"it ends at byte {at + count}")
        got = count
