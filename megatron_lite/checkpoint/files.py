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
from typing import Any

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


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: a reader sees the old file or the new one, whole, whatever happens meanwhile."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync_directory(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Put `content` at `path`, as `write_atomically` does, for people to read."""
    write_atomically(path, f"{json.dumps(content, indent=2)}\n".encode())


def fsync_directory(path: Path) -> None:
    """Make the names in a directory (new files, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
