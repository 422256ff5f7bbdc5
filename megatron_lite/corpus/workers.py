"""Processes that work for this one: they end when it ends, however it does, and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@contextmanager
def worker_processes(
    workers: int,
    start: Callable[..., object] | None = None,
    arguments: tuple[Any, ...] = (),
    remedy: str = "fewer workers",
) -> Iterator[Executor]:
    """A pool of so many processes, each of which calls `start` first. After an exception they are killed, not waited
    for: none writes anything once the `with` block has ended.

    Raises ChildProcessError, which names the `remedy`, where one of them is killed by others.
    """
    # Spawned, not forked: a fork would copy the locks of threads that tokenizer libraries and numpy keep.
    context = multiprocessing.get_context("spawn")
    pool = _Pool(workers, context, _start, (start, arguments))
    try:
        yield pool
    except BrokenProcessPool:
        _kill(pool)
        raise ChildProcessError(
            f"a worker process ended unexpectedly, often for lack of memory: try {remedy}"
        ) from None
    except BaseException:
        _kill(pool)
        raise
    pool.shutdown()


def in_order(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    pool: Executor | None,
    at_once: int,
) -> Generator[tuple[Argument, Result]]:
    """Each argument with what `function` makes of it, in their order, by the pool (None: by this process).

    at_once: how many are in flight; it bounds memory, and keeps every worker busy where it is more than there are
    """
    if pool is None:
        yield from ((item, function(item)) for item in arguments)
        return
    waiting = iter(arguments)
    flight: deque[tuple[Argument, Future[Result]]] = deque()
    flight.extend((item, pool.submit(function, item)) for item in islice(waiting, at_once))
    while flight:
        item, future = flight.popleft()
        yield item, future.result()
        flight.extend((item, pool.submit(function, item)) for item in islice(waiting, 1))


@contextmanager
def one_interrupt() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt; further ones do not disturb the clearing up (`timeout -s INT` sends two,
    and so do people) nor the end of the process, which is for command lines. One that ignores Ctrl-C goes on so.
    """
    before = signal.getsignal(signal.SIGINT)
    came = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if not came:
            signal.signal(signal.SIGINT, before)


class _Pool(ProcessPoolExecutor):
    def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
        """Processes are started here: Ctrl-C waits, and they inherit that it is blocked, from their first moment on."""
        with _no_interrupt():
            return super().submit(*arguments, **options)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C comes at the end. (Blocked, it comes to another thread, of numpy's say, and from there to Python.)"""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    noted = threading.current_thread() is threading.main_thread() and before is not None
    if noted:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if noted:
            signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _kill(pool: _Pool) -> None:
    """(`kill_workers` of Python 3.14.)"""
    for process in list((pool._processes or {}).values()):
        process.kill()
    # Of a result that a worker was writing the pool's own thread would wait for the rest, and the end of Python for the
    # thread: with this end closed, too, there is no writer left.
    results = getattr(pool, "_result_queue", None)
    if results is not None:
        results._writer.close()
    pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        """Workers of a killed parent would wait for work for ever."""
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if start is not None:
        start(*arguments)
