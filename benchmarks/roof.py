"""The two roofs of a machine as plain torch reaches them: bandwidth by a copy, arithmetic by a matrix product."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy between buffers far larger than any cache."""
    size = 2**32 if device == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a square matrix product of random numbers (zeros would run faster)."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out: Tensor = torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device)


def median_seconds(work: Callable[[], object], device: str, times: int = 7) -> float:
    """Median of some calls after two that are not counted."""
    work(), work()
    return statistics.median(seconds(work, device) for _ in range(times))


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call: by CUDA events, or wall time."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
