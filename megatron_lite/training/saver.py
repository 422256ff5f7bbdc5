"""Saving beside training: the step waits for a copy in host memory, a thread does the rest."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import Deferred, HostCopy, Piece, available_bytes, save
from megatron_lite.model.runtime import DTYPES
from megatron_lite.training.engine import Engine
from megatron_lite.training.saving import FOLDER, Progress, gather, metadata_of

logger = logging.getLogger(__name__)

WEIGHTS_FOLDER = "weights"


class Saver:
    """Saves checkpoints into a run's output folder, in the background where `checkpoint.async_save` is set.

    All methods but `failed` are for every rank together. The thread's ranks agree in a gloo group of their own, so
    that nothing of a save can meet training's collectives. One save runs at a time: the next one, the end of the
    `with` block and an error wait for it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gather = partial(gather, group=dist.new_group(backend="gloo"))
        self._host = HostCopy()
        self._fits: bool | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

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
            self._host.close()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save in the background has failed; `wait` raises the reason."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing is being saved.

        Raises:
            CheckpointError: on every rank, where the save that ran failed; what was saved before is as it was.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
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
        background = self._fits and not last
        if background:
            pieces = self._host.take(pieces)
        metadata, step = metadata_of(self._engine, progress), progress.step  # it moves on meanwhile
        mesh, output, waited = self._engine.mesh, Path(config.train.output_dir), 0.0

        def write(folder: str, what: list[Piece], keep: int = 0) -> None:
            world: dict[str, Any] = {"rank": mesh.rank, "world_size": mesh.world_size, "gather": self._gather}
            path = save(output / folder, step, what, metadata, **world, keep=keep)
            if mesh.rank == 0:
                stall = f", training waited {waited:.1f} s" if background else ""
                logger.info("step %d | saved %s in %.1f s%s", step, path, time.perf_counter() - begin, stall)

        def work() -> None:
            if full:
                write(FOLDER, pieces, config.checkpoint.keep)
            if weights:
                write(WEIGHTS_FOLDER, self._in_weights_precision(pieces))

        if not background:
            work()
            return
        waited = time.perf_counter() - begin
        self._thread = threading.Thread(target=self._run, args=(work,), name="saver")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, the step that finds it raises it
            self._error = error

    def _in_weights_precision(self, pieces: Iterable[Piece]) -> list[Piece]:
        dtype = DTYPES[self._engine.config.checkpoint.weights_precision]

        def cast(data: torch.Tensor | Deferred) -> Deferred:
            assert isinstance(data, torch.Tensor)
            return Deferred(dtype, tuple(data.shape), lambda: data.to(dtype))

        return [replace(piece, data=cast(piece.data)) for piece in pieces if piece.kind == "weight"]

    def _has_room(self, pieces: list[Piece]) -> bool:
        """Whether every node has memory for its ranks' copies; half of what is free is left to others. Collective."""
        own = sum(piece.data.numel() * piece.data.dtype.itemsize for piece in pieces)
        by_host: dict[str, list[tuple[int, int | None]]] = {}
        for host, size, free in self._gather((socket.gethostname(), own, available_bytes())):
            by_host.setdefault(host, []).append((size, free))
        for host, ranks in by_host.items():
            wanted = sum(size for size, _ in ranks)
            least = min((free for _, free in ranks if free is not None), default=2 * wanted)
            if 2 * wanted > least:
                if self._engine.mesh.rank == 0:
                    logger.warning(
                        "checkpoint.async_save: a copy of the state takes %.1f GiB on %s, and %.1f are free: "
                        "training will wait for each save",
                        *(wanted / 2**30, host, least / 2**30),
                    )
                return False
        return True
