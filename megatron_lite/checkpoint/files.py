"""Files that are on the disk when we say so: streamed safetensors, checksums, atomic replacement.

The container is safetensors (https://huggingface.co/docs/safetensors): eight bytes of little-endian header
length, a JSON header, then the raw tensors end to end. We write it ourselves, a tensor after the other, because
the library's own writer wants every tensor in host memory at once; it reads what we write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_lite.checkpoint.blocks import BlockWriter, Bytes, crc32

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

_BLOCK = 1 << 21  # bytes read at a time, and then summed or cast: they stay in the processor's cache


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


def read_blocks(path: Path, begin: int, size: int, out: Bytes | None = None) -> Iterator[Bytes]:
    """Bytes [begin, begin + size) of a file, a block at a time: parts of `out`, which they fill, or of one block.

    Raises OSError where the file cannot be read, or ends before.
    """
    # Opened each time, because threads that share a descriptor spoil one another's read-ahead.
    with open(path, "rb", buffering=0) as file:
        block = np.empty(min(size, _BLOCK), np.uint8) if out is None else out
        for at in range(0, size, _BLOCK):
            first = 0 if out is None else at
            part = block[first : first + min(_BLOCK, size - at)]
            filled = 0
            while filled < part.size:
                count = os.preadv(file.fileno(), [part.data[filled:]], begin + at + filled)
                if count == 0:
                    raise OSError(f"it ends at byte {begin + at + filled}")
                filled += count
            yield part


def read_values(path: Path, begin: int, dtype: torch.dtype, out: torch.Tensor, *, summed: bool) -> int:
    """Fill `out`, 1-D, of any device and type, with values of `dtype` from byte `begin` of a file on.

    Returns the CRC-32 of their bytes where it is to be `summed`. Raises as `read_blocks` does.
    """
    in_place = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
    target: Bytes | None = out.view(torch.uint8).numpy() if in_place else None
    crc = done = 0
    for block in read_blocks(path, begin, out.numel() * dtype.itemsize, target):
        if summed:
            crc = crc32(block.data, crc)
        if not in_place:
            values = torch.from_numpy(block).view(dtype)
            out[done : done + values.numel()].copy_(values)
            done += values.numel()
    return crc


def crc_of_range(path: Path, begin: int, size: int) -> int:
    """CRC-32 of bytes [begin, begin + size) of a file. Raises as `read_blocks` does."""
    crc = 0
    for block in read_blocks(path, begin, size):
        crc = crc32(block.data, crc)
    return crc


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
