"""A new file, written in large blocks past the page cache.

Gigabytes written through the page cache take a core several times as long as the disk needs (a page is found, filled
and later sent, a million times), and push out what training reads. So they go from a few blocks of memory straight to
the disk (O_DIRECT, open(2)), several at a time; where a file system has no such way, through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

try:
    from zlib_ng.zlib_ng import crc32 as crc32
except ImportError:  # where no package can be installed
    # The same sums, at a ninth of the rate: then they take as long as the copying.
    from zlib import crc32 as crc32

Bytes = NDArray[np.uint8]

_BLOCK = 1 << 22  # bytes; large, because each waits for the disk's answer
_AT_ONCE = 8  # blocks on their way to the disk
SECTOR = 4096  # bytes; what goes past the cache begins and ends, in the file and in memory, on a multiple
_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockWriter:
    """Writes a new file of `size` bytes, in order; the end of the `with` block returns once the disk has it.

    Raises OSError where the disk refuses: a full one before anything is written, where the file system can tell.
    """

    def __init__(self, path: Path, size: int) -> None:
        # In the file, the block that is being filled begins at `_begin`.
        self._path, self._size, self._begin, self._filled = path, size, 0, 0
        # It starts a thread only for a block that finds none idle.
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._flight: deque[tuple[Future[None], Bytes]] = deque()
        self._block = self._new_block()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            set_direct(self._file, True)
            with _named(path):
                _reserve(self._file, size)
        except OSError:
            os.close(self._file)
            raise

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
            os.close(self._file)

    def write(self, data: Bytes, crc: int = 0) -> int:
        """Take the next bytes (1-D); their CRC-32, carried on: taken in the block, where the cache has them.

        Raises OSError where the disk refused an earlier block.
        """
        while data.size:
            part = self._block[self._filled : self._filled + data.size]
            # Unlike the assignment of a memoryview's slice, this lets other threads run meanwhile.
            np.copyto(part, data[: part.size])
            crc = crc32(part.data, crc)
            data, self._filled = data[part.size :], self._filled + part.size
            if self._filled == self._block.size:
                self._send()
                self._block = self._new_block()
        return crc

    def _new_block(self) -> Bytes:
        """Memory for a block: of one that the disk has got, where as many as may be are on their way."""
        if len(self._flight) == _AT_ONCE:
            sent, block = self._flight.popleft()
            sent.result()
            return block
        return np.frombuffer(mmap.mmap(-1, min(_BLOCK, -(-self._size // SECTOR) * SECTOR)), np.uint8)

    def _send(self) -> None:
        data = self._block[: -(-self._filled // SECTOR) * SECTOR]
        self._flight.append((self._pool.submit(self._write, data, self._begin), self._block))
        self._begin, self._filled = self._begin + self._filled, 0

    def _write(self, data: Bytes, begin: int) -> None:
        refused = False
        with _named(self._path):
            while data.size:
                try:
                    count = os.pwrite(self._file, data.data, begin)
                    if count == 0:
                        raise OSError(errno.EIO, "the disk takes no more of it and does not say why")
                    data, begin = data[count:], begin + count
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or refused:
                        raise
                    # The rest of a write cut short, or a file system that wants another alignment.
                    refused = True
                    set_direct(self._file, False)

    def _finish(self) -> None:
        assert self._begin + self._filled == self._size, "as many bytes as were announced"
        if self._filled:
            self._send()  # with what fills its last sector, cut off again below
        for sent, _ in self._flight:
            sent.result()
        with _named(self._path):
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)


def set_direct(file: int, direct: bool) -> bool:
    """Have what is read and written of an open file go past the page cache, or not; whether the system would."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
    except OSError:
        return False
    return is_direct(file) == direct


def is_direct(file: int) -> bool:
    """Whether what is read and written of an open file goes past the page cache."""
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's refusals, which know a descriptor, say which file it is."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _reserve(file: int, size: int) -> None:
    """Ask for a file's room at once: a full disk says so before the writing, and the file lies in one place.

    Not os.posix_fallocate, which writes to every block where the file system has no such call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return  # as on macOS, where it is found out on the way
    if libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    if (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))
