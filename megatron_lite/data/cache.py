"""Index arrays kept on disk, so that a restart and the other ranks of a node map them instead of building
them.

An entry is a folder named by a hash of everything the arrays depend on. It is written beside its place and
renamed, so that it is whole or absent, and has checksums, so that one that a power failure or a disk damaged is
built anew.
One process builds while the others on that disk wait for its lock; nothing is assumed to be shared between
nodes, and where nothing can be written the arrays are built in memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


def content_stamp(values: NDArray[Any]) -> str:
    """A hash of an array's bytes, read in parts (the array may be mapped and large)."""
    digest = hashlib.blake2b(digest_size=16)
    for first in range(0, len(values), 1 << 20):
        digest.update(values[first : first + (1 << 20)].tobytes())
    return digest.hexdigest()


def cached(
    directory: Path | None, key: Mapping[str, Any], build: Callable[[], Arrays], title: str = "index"
) -> Arrays:
    """`build()`, or what it returned before for the same key, mapped read-only from `directory`.

    key: all that the arrays depend on, as JSON values; a change of any of them is another entry
    title: what they are, for the log
    """
    if directory is None:
        return build()
    text = json.dumps(key, sort_keys=True)
    entry = directory / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    arrays = _load(entry)
    if arrays is not None:
        logger.debug("%s: found in %s (%s)", title, entry, _size(arrays))
        return arrays
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(entry.with_suffix(".lock")):
            arrays = _load(entry)
            if arrays is None:
                begin = time.perf_counter()
                arrays = build()
                _store(entry, key, arrays)
                logger.info(
                    "%s: built in %.1f s into %s (%s)",
                    *(title, time.perf_counter() - begin, entry, _size(arrays)),
                )
                arrays = _load(entry) or arrays
            return arrays
    except OSError as error:
        logger.info("%s: the cache %s cannot be used (%s): kept in memory", title, directory, error)
        return build() if arrays is None else arrays


def _size(arrays: Arrays) -> str:
    return f"{sum(array.nbytes for array in arrays.values()) / 1e6:,.1f} MB"


def _load(entry: Path) -> Arrays | None:
    """The entry's arrays, or None where it is absent or damaged."""
    try:
        checksums = dict(json.loads((entry / "key.json").read_text())["arrays"])
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in checksums}
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    if all(_checksum(arrays[name]) == checksum for name, checksum in checksums.items()):
        return arrays
    logger.warning("%s is damaged: built again", entry)
    return None


def _checksum(array: NDArray[Any]) -> int:
    """CRC-32 of the array's bytes, in parts, so that other threads go on."""
    checksum = 0
    for first in range(0, len(array), 1 << 20):
        checksum = zlib.crc32(array[first : first + (1 << 20)].tobytes(), checksum)
    return checksum


def _store(entry: Path, key: Mapping[str, Any], arrays: Arrays) -> None:
    mine = f"{entry.name}.tmp-{socket.gethostname()}-"
    for left in entry.parent.glob(f"{mine}*"):  # of a process that was killed: this one has its lock
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=mine, dir=entry.parent))
    try:
        temporary.chmod(0o755)
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        checksums = {name: _checksum(array) for name, array in arrays.items()}
        (temporary / "key.json").write_text(json.dumps({"key": dict(key), "arrays": checksums}, indent=1))
        if _load(entry) is not None:
            return  # of a node that the lock does not reach, and mapped by others: it must stay
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        try:
            os.rename(temporary, entry)
        except OSError as error:
            # Where locks do not work another process may have been first: its entry is as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the file's lock; its holder's death frees it. File systems without locks only lose the saving."""
    with open(path, "wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
