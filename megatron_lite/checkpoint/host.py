"""A copy in host memory of what a rank saves, so that training goes on while it is written."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_lite.checkpoint.layout import Piece

_ALIGN = 64  # bytes: a cache line, and a multiple of every dtype's width
# By width in bytes: what NumPy knows and a tensor of any dtype and strides can be taken for.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HostCopy:
    """Memory for one copy of a rank's pieces, kept from one save to the next: the first write to a page takes about ten
    times as long as those that follow.

    It holds as many bytes as the most that was copied: 12 for each parameter that the rank owns where masters and
    moments are saved, 4 where weights alone are. It is page-locked where they come from a GPU, and may be.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked: bool | None = None  # None: not tried

    def begin(self, pieces: Iterable[Piece]) -> tuple[list[Piece], Callable[[], None]]:
        """The same pieces with data that are still to be copied, and what copies them; they overwrite the last ones.

        What copies them may be called in any thread, once. Nothing may change the pieces before it has returned; what
        the caller has done to them, on its CUDA stream, is in the copy.

        Raises MemoryError or OSError where the system refuses the memory.
        """
        pieces = list(pieces)
        tensors = [piece.data for piece in pieces if isinstance(piece.data, Tensor)]
        assert len(tensors) == len(pieces), "a deferred tensor is not copied, it is made in its turn"
        sizes = [-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors]
        self._reserve(sum(sizes))
        copies, at = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            copies.append(self._memory[at : at + tensor.nbytes].view(tensor.dtype))
            at += size
        gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)  # a rank has one
        event = None if gpu is None else torch.cuda.current_stream(gpu).record_event()

        def copy() -> None:
            with contextlib.ExitStack() as stack:
                if gpu is not None and event is not None:
                    stack.enter_context(self._stream_after(event, gpu))
                for to, tensor in zip(copies, tensors, strict=True):
                    _copy(to, tensor)

        return [replace(piece, data=data) for piece, data in zip(pieces, copies, strict=True)], copy

    def close(self) -> None:
        """Give the memory back, after the last use of the copies."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._locked = torch.empty(0, dtype=torch.uint8), None

    def _reserve(self, size: int) -> None:
        if size > self._memory.numel():
            self.close()  # first, so that there are never two
            # Shared, for page locks: after a fork (subprocesses begin with one) the next write to a private page goes
            # to a new one, and the GPU would still write to the old.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)

    @contextlib.contextmanager
    def _stream_after(self, event: torch.cuda.Event, gpu: torch.device) -> Iterator[None]:
        """A stream of its own in this thread; what is queued there comes after `event`, and is done at the end."""
        # A new thread's GPU is the first one, where a context of this process would take memory from another rank.
        with torch.cuda.device(gpu):
            self._lock()
            stream = torch.cuda.Stream()
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    stream.synchronize()

    def _lock(self) -> None:
        """Locks the memory's pages for the GPUs, once."""
        if self._locked is None:
            # Not `pin_memory`, which rounds up to the next power of two.
            status = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0)
            self._locked = int(status) == 0
            if not self._locked:  # the copy is right all the same, and slower; each save would hear the same
                with contextlib.suppress(RuntimeError):  # which the next kernel would be blamed for
                    torch.zeros(1, device="cuda")


def _copy(to: Tensor, tensor: Tensor) -> None:
    if tensor.is_cuda:
        to.copy_(tensor, non_blocking=True)
        return
    # On one core: torch's `copy_` would start a second team of OpenMP threads, which disturbs training's by turns.
    integers = _INTEGERS[tensor.itemsize]
    np.copyto(to.view(integers).numpy(), tensor.detach().view(integers).numpy())


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that can be taken without swapping, or being killed for it; None where the system does not tell.

    It is what the machine has, and no more than each control group (a container, a SLURM job) still allows.
    """
    try:
        text = (root / "proc/meminfo").read_text()
        free = int(text.partition("MemAvailable:")[2].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return None
    return min([free, *_left_by_groups(root)])


# Of control groups of version 2 and 1: limit, what is in use of it, and in memory.stat the page cache in that which
# gives way before anything is killed.
_GROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_by_groups(root: Path) -> list[int]:
    """What the process's control groups leave: its own one, and all that this one is in, as each has a limit."""
    left = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        (limit, usage, cache), mount = (_GROUP_V1, "memory") if controllers else (_GROUP_V2, "")
        top = root / "sys/fs/cgroup" / mount
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            # No such folder: a container may see the machine's path, and of its folders only its own, as the top one.
            with contextlib.suppress(OSError, ValueError):  # a limit of "max" is none
                most, used = (int((group / name).read_text()) for name in (limit, usage))
                stat = dict(line.split() for line in _lines(group / "memory.stat"))
                left.append(max(0, most - used + int(stat.get(cache, 0))))
            if group == top:
                break
    return left


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
