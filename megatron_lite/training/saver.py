"""Saving beside training: a thread copies the state to host memory and writes; the next update waits for the copy."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import CheckpointError, Deferred, HostCopy, Piece, available_bytes, save
from megatron_lite.model.runtime import DTYPES
from megatron_lite.training.engine import Engine
from megatron_lite.training.saving import FOLDER, Progress, gather, metadata_of

logger = logging.getLogger(__name__)

WEIGHTS_FOLDER = "weights"


class RankLost(CheckpointError):
    """Another rank died during a save, or could not be reached; those that are left raise it, each by itself."""


class _Copying:
    """The state's way to host memory, in one thread, while training's goes on as far as its next update.

    Attributes:
        pieces: whose data are there once it is done.
        waited: seconds for which training's thread was kept, by the save and by the update that had to wait for this.
    """

    def __init__(self, pieces: list[Piece], copy: Callable[[], None]) -> None:
        self.pieces, self.waited = pieces, 0.0
        self._copy, self._lock, self._done = copy, threading.Lock(), threading.Event()
        self._waits_since: float | None = None

    def run(self) -> None:
        """Copies. Whether or not it can be done, no update waits any longer, and `waited` stays as it is."""
        try:
            self._copy()
        finally:
            with self._lock:
                self._done.set()
                if self._waits_since is not None:
                    self.waited += time.perf_counter() - self._waits_since

    def wait(self) -> None:
        """Returns when what was copied may change."""
        with self._lock:
            if not self._done.is_set():
                self._waits_since = time.perf_counter()
        self._done.wait()


class Saver:
    """Saves checkpoints into a run's output folder, in the background where `checkpoint.async_save` is set.

    All methods but `failed` are for every rank together. The thread's ranks agree in a gloo group of their own, so
    that nothing of a save can meet training's collectives. One save runs at a time: the next one, the end of the
    `with` block and an error wait for it. What is saved is the state at the call, also of an update that comes before
    the copy is done: only the optimizer's step changes masters and moments, and it waits.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._group = dist.new_group(backend="gloo")
        self._host = HostCopy()
        self._fits: bool | None = None
        self._thread: threading.Thread | None = None
        self._copying: _Copying | None = None
        self._error: BaseException | None = None
        self._hook = engine.optimizer.register_step_pre_hook(self._before_update)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            logger.error("%s", own)  # what ended the run is said by the other
        finally:
            self._hook.remove()
            self._host.close()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save in the background has failed; `wait` raises the reason."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing is being saved.

        Raises:
            CheckpointError: on every rank, where the save that ran failed; what was saved before is as it was. It is
                `RankLost` where a rank died.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = self._copying = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def save(
        self, progress: Progress, *, full: bool = True, weights: bool = False, last: bool = False
    ) -> None:
        """Saves what a run goes on from (`full`), or the weights alone in `weights_precision`, or both.

        Args:
            last: no step follows that could run meanwhile, so return when it is done.

        Raises:
            CheckpointError: on every rank, where this save or the one before failed.
        """
        begin, config = time.perf_counter(), self._engine.config
        self.wait()
        pieces = list(self._engine.pieces())
        if self._fits is None:
            self._fits = config.checkpoint.async_save and self._has_room(pieces)
        if not full:
            pieces = [piece for piece in pieces if piece.kind == "weight"]
        copying = self._begun(pieces) if self._fits and not last else None
        if copying is not None:
            pieces = copying.pieces
        metadata, step = metadata_of(self._engine, progress), progress.step  # it moves on meanwhile
        mesh, output = self._engine.mesh, Path(config.train.output_dir)

        def write(folder: str, what: list[Piece], keep: int = 0) -> None:
            world: dict[str, Any] = {"rank": mesh.rank, "world_size": mesh.world_size, "gather": self._gather}
            path = save(output / folder, step, what, metadata, **world, keep=keep)
            if mesh.rank == 0:
                stall = "" if copying is None else f", training waited {copying.waited:.2f} s"
                logger.info("step %d | saved %s in %.1f s%s", step, path, time.perf_counter() - begin, stall)

        def work() -> None:
            if copying is not None:
                self._copy(copying, step)
            if full:
                write(FOLDER, pieces, config.checkpoint.keep)
            if weights:
                write(WEIGHTS_FOLDER, self._in_weights_precision(pieces))

        if copying is None:
            work()
            return
        thread = threading.Thread(target=self._run, args=(work,), name="saver")
        copying.waited = time.perf_counter() - begin
        thread.start()
        self._thread, self._copying = thread, copying

    def _before_update(self, *_: object) -> None:
        if self._copying is not None:
            self._copying.wait()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, the step that finds it raises it
            self._error = error

    def _gather(self, value: object) -> list[Any]:
        """Every rank's value, in the group of the saves."""
        try:
            return gather(value, self._group)
        except RuntimeError as error:  # gloo's word for a connection that is closed or silent
            raise RankLost(
                f"a save was not finished: another rank died meanwhile, or could not be reached ({error}): look for "
                "its own message; earlier checkpoints are as they were, and the same command goes on from the newest"
            ) from error

    def _begun(self, pieces: list[Piece]) -> _Copying | None:
        """Memory for a copy of the pieces; None on every rank where it was refused to any. Collective."""
        copying, fault = None, None
        try:
            copying = _Copying(*self._host.begin(pieces))
        except (MemoryError, OSError, RuntimeError) as error:  # torch raises the last
            fault = self._fault(error)
        faults = [fault for fault in self._gather(fault) if fault is not None]
        if faults and self._engine.mesh.rank == 0:
            logger.warning(
                "checkpoint.async_save: there is no memory for a copy of the state (%s): training waits for this save",
                faults[0],
            )
        return None if faults else copying

    def _copy(self, copying: _Copying, step: int) -> None:
        """Copies, and takes the longest time that any rank's training waited for all. Collective."""
        fault, cause = None, None
        try:
            copying.run()
        except Exception as error:  # whatever it is, the other ranks are waiting for word of it
            fault, cause = self._fault(error), error
        reports = self._gather((copying.waited, fault))
        if faults := [fault for _, fault in reports if fault is not None]:
            raise CheckpointError(
                f"step {step} was not saved: copying the state to host memory: {faults[0]}; "
                "earlier checkpoints are as they were"
            ) from cause
        copying.waited = max(waited for waited, _ in reports)

    def _fault(self, error: Exception) -> str:
        return f"{self._engine.mesh.describe()}: {str(error) or type(error).__name__}"

    def _in_weights_precision(self, pieces: Iterable[Piece]) -> list[Piece]:
        dtype = DTYPES[self._engine.config.checkpoint.weights_precision]

        def cast(data: torch.Tensor | Deferred) -> Deferred:
            assert isinstance(data, torch.Tensor)
            return Deferred(dtype, tuple(data.shape), lambda: data.to(dtype))

        return [replace(piece, data=cast(piece.data)) for piece in pieces if piece.kind == "weight"]

    def _has_room(self, pieces: list[Piece]) -> bool:
        """Whether every node has memory for its ranks' copies. Collective."""
        own = sum(piece.data.numel() * piece.data.dtype.itemsize for piece in pieces)
        short = without_room(self._gather((socket.gethostname(), own, available_bytes())))
        if short is not None and self._engine.mesh.rank == 0:
            host, wanted, free = short
            logger.warning(
                "checkpoint.async_save: a copy of the state takes %.1f GiB on %s, and %.1f are free: "
                "training will wait for each save",
                *(wanted / 2**30, host, free / 2**30),
            )
        return short is None


def without_room(ranks: Iterable[tuple[str, int, int | None]]) -> tuple[str, int, int] | None:
    """The first node whose memory is short, what its ranks want together, and what is free; None where all have room.

    Half of what is free is left to others. A node that does not tell what is free has room.

    Args:
        ranks: each rank's node, the bytes that it wants, and what it finds free there.
    """
    by_host: dict[str, list[tuple[int, int | None]]] = {}
    for host, size, free in ranks:
        by_host.setdefault(host, []).append((size, free))
    for host, found in by_host.items():
        wanted = sum(size for size, _ in found)
        least = min((free for _, free in found if free is not None), default=2 * wanted)
        if 2 * wanted > least:
            return host, wanted, least
    return None
