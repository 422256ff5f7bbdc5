"""Ranks for tests: processes forked from the one that has imported everything, a fresh set for every test.

Forking takes a fraction of a second where a launcher takes many. It is safe with one OpenMP thread in the parent;
a test that starts torch's thread pool in the parent would make its children hang, so the number is set here.
"""

import contextlib
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)

TIMEOUT = 300.0


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """Runs `function(*args)` on every rank of a fresh gloo process group and returns the results in rank order.

    Raises:
        RankFailed: with the traceback of the first rank that failed; the others are killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as folder:
        readers: list[multiprocessing.connection.Connection] = []
        pids: list[int] = []
        for rank in range(world_size):
            reader, writer = multiprocessing.connection.Pipe(duplex=False)
            pid = os.fork()
            if pid == 0:
                reader.close()
                _child(rank, world_size, f"{folder}/store", writer, function, args)
            writer.close()
            readers.append(reader)
            pids.append(pid)
        try:
            return _collect(readers, time.monotonic() + timeout)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for reader in readers:
                reader.close()


def _collect(readers: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(readers))) - set(results))
            raise RankFailed(f"ranks {missing} did not end in time")
        for reader in ready:
            rank = readers.index(reader)
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if not ok:
                raise RankFailed(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _child(
    rank: int, world_size: int, store: str, writer: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Never returns: a forked child must not run the parent's test session to its end."""
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        _send(writer, True, function(*args))
        dist.barrier()  # no rank leaves while a peer still talks to it
    except BaseException:
        with contextlib.suppress(OSError):
            _send(writer, False, traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _send(writer: Any, ok: bool, value: Any) -> None:
    """Plain pickle: torch would hand tensors over by file descriptors that die with this process."""
    writer.send_bytes(pickle.dumps((ok, value)))
