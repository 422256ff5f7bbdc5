"""A save beside computing: how long it keeps the thread that computes, and how much longer the computing takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

SIDE = 2048  # of the square matrices
PRODUCTS = 20  # of a step: 0.34 TFLOP, about 1.5 s of two cores

Save = Callable[[], tuple[Callable[[], Any], Future[Any]]]


def beside_computing(begin: Save, products: int = PRODUCTS) -> dict[str, float]:
    """One save, in seconds, beside steps of matrix products, one after the other, until it is done.

    As in training, the save begins between two steps, and what it saves may change at the end of the next one. `save`
    is until everything is on the disk; `stall` the call and the wait at the end of the first step; `lost` how much
    longer all the products took than as many alone, of which a step takes `computing` (the mean of before and after).

    Args:
        begin: begins the save, and returns what waits until the state may change, and what is done with the save.
    """
    one, other, out = (torch.randn(SIDE, SIDE) for _ in range(3))

    def compute(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            torch.mm(one, other, out=out)
        return time.perf_counter() - begun

    compute(2)
    alone, ends = compute(products), list[float]()
    begun = time.perf_counter()
    wait, saved = begin()
    stall = time.perf_counter() - begun
    saved.add_done_callback(lambda _: ends.append(time.perf_counter()))
    took, count = compute(products), products
    due = time.perf_counter()
    wait()
    stall += time.perf_counter() - due
    while not saved.done():
        took, count = took + compute(1), count + 1
    saved.result()
    alone = (alone + compute(products)) / 2
    return {
        "save": ends[0] - begun,
        "stall": stall,
        "computing": alone,
        "lost": took - alone * count / products,
    }
