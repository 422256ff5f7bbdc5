"""Files that are on the disk when we say so: streamed safetensors, checksums, atomic replacement.

The container is safetensors (https://huggingface.co/docs/safetensors): eight bytes of little-endian header
length, a JSON header, then the raw tensors end to end. We write it ourselves, a tensor after the other, because
the library's own writer wants every tensor in host memory at once; it reads what we write.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_lite.checkpoint.blocks import BlockWriter, Bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_NAMES: Mapping[torch.dtype, str] = _DTYPES
DTYPES_BY_NAME: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _DTYPES.items()}

_CHUNK = 1 << 23  # bytes read at a time, by each reader
_PAGE = 1 << 21  # bytes read and summed at a time, by each reader: stays in the processor's cache
READERS = 4  # threads


@dataclass(frozen=True)
class Deferred:
    """A tensor made only when its turn to be written comes: a whole model need not fit in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Written:
    """What a safetensors file must look like: its size, and the CRC-32 of its header and of each tensor."""

    bytes: int
    header_bytes: int
    header_crc: int
    tensor_crcs: dict[str, int]  # in file order


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write `tensors` to a new file at `path` and return once the disk has it.

    Tensors may live on any device; two at a time are brought to host memory. Raises OSError where the disk
    refuses, ValueError for a dtype that safetensors does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: {tensor.dtype} has no safetensors name")
    # Wide types first: with no padding between tensors this keeps every one aligned to its own width.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        dtype = DTYPE_NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with BlockWriter(path, len(head) + end) as file:
        head_crc = file.write(np.frombuffer(head, np.uint8))
        made = _made(tensors[name] for name in order)
        crcs = {name: file.write(next(made)) for name in order}
    return Written(len(head) + end, len(head), head_crc, crcs)


def _made(tensors: Iterable[torch.Tensor | Deferred]) -> Iterator[Bytes]:
    """The bytes of each tensor, the next being made, by a thread, while one is written: two are in memory at a time."""
    with ThreadPoolExecutor(1) as pool:
        last: Future[Bytes] | None = None
        for tensor in tensors:
            ahead = pool.submit(_bytes, tensor)
            if last is not None:
                yield last.result()
            last = ahead
        if last is not None:
            yield last.result()


def _bytes(tensor: torch.Tensor | Deferred) -> Bytes:
    """The bytes of a tensor, row-major."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if isinstance(tensor, Deferred):
        tensor = tensor.load()
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype, "a deferred tensor is not as announced"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found: Bytes = flat.view(torch.uint8).numpy()
    return found


def crc_of_ranges(path: Path, begins: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """CRC-32 of each range of a file: `sizes` bytes from `begins` on. Raises OSError where it cannot be read.

    Several threads read: fast disks, and those over a network, give one reader a part of their speed only.
    """
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(partial(_crc_of_range, file.fileno()), begins, sizes))


def _crc_of_range(file: int, begin: int, size: int) -> int:
    buffer, crc, at = memoryview(bytearray(min(size, _PAGE))), 0, begin
    while at < begin + size and (count := os.preadv(file, [buffer[: begin + size - at]], at)):
        crc, at = zlib.crc32(buffer[:count], crc), at + count
    return crc


def read_range(file: int, begin: int, out: memoryview, pool: Executor) -> None:
    """Fill `out` with the bytes of a file descriptor from `begin` on, in the threads of `pool`.

    Raises OSError where the file ends before.
    """

    def read(at: int) -> None:
        part = out[at : at + _CHUNK]
        while part:
            count = os.preadv(file, [part], begin + at)
            if count == 0:
                raise OSError(f"it ends at byte {begin + at}")
            at, part = at + count, part[count:]

    if len(out) <= _CHUNK:
        read(0)
    else:
        list(pool.map(read, range(0, len(out), _CHUNK)))


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: a reader sees the old file or the new one, whole, whatever happens meanwhile."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory (new files, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
