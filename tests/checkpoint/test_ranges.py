"""Ranges of a file: any alignment, through the page cache or past it, with file systems that refuse."""

import errno
import fcntl
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import ranges
from megatron_lite.checkpoint.ranges import crc_of_range, read_values

NUMBERS = 9000
HEAD = 8 * 3


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_BLOCK", 8192)
    monkeypatch.setattr(ranges, "_LARGE", 16)
    monkeypatch.setattr(ranges, "_own", threading.local())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    data = torch.arange(NUMBERS, dtype=torch.float32)
    (tmp_path / "x").write_bytes(b"x" * HEAD + data.numpy().tobytes())
    return tmp_path / "x"


def direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every read whether it went past the cache."""
    found, read = [], os.preadv

    def noted(file: int, buffers: Any, at: int) -> int:
        found.append(direct(file))
        return read(file, buffers, at)

    monkeypatch.setattr(os, "preadv", noted)
    return found


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 1, 1018, 1019, 4090, NUMBERS - 1])
@pytest.mark.parametrize("count", [1, 3, 4, 2047, 2048, 5000, NUMBERS])
def test_any_range(
    path: Path, past_cache: bool, dtype: torch.dtype, begin: int, count: int, reads: list[bool]
) -> None:
    count = min(count, NUMBERS - begin)
    around = torch.full((count + 2,), -1, dtype=dtype)
    place = HEAD + 4 * begin
    crc = read_values(path, place, torch.float32, around[1:-1], summed=True, past_cache=past_cache)
    assert torch.equal(around[1:-1], torch.arange(begin, begin + count).to(dtype))
    assert around[0] == around[-1] == -1
    assert (
        crc
        == zlib.crc32(path.read_bytes()[place : place + 4 * count])
        == crc_of_range(path, place, 4 * count)
    )
    assert read_values(path, place, torch.float32, around[1:-1], summed=False, past_cache=past_cache) == 0
    assert True in reads if past_cache and count >= 4 else True not in reads


def refuse(
    what: Any, when: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, code: int = errno.EINVAL
) -> None:
    original = getattr(*what)

    def call(*arguments: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    monkeypatch.setattr(*what, call)


def whole(path: Path) -> bool:
    out = torch.zeros(NUMBERS)
    read_values(path, HEAD, torch.float32, out, summed=False, past_cache=True)
    return torch.equal(out, torch.arange(NUMBERS, dtype=torch.float32))


def test_a_file_system_without_a_way_past_the_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[bool]
) -> None:
    refuse((fcntl, "fcntl"), lambda file, command, flags=0: bool(flags & os.O_DIRECT), monkeypatch)
    assert whole(path) and True not in reads


def test_a_file_system_that_wants_another_alignment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse((os, "preadv"), lambda file, *_: direct(file), monkeypatch)
    assert whole(path)


@pytest.mark.parametrize("past_cache", [True, False])
def test_other_refusals_are_raised(path: Path, past_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EIO, errno.EINVAL):
        with monkeypatch.context() as patch:
            refuse((os, "preadv"), lambda *_: True, patch, code)
            with pytest.raises(OSError, match=os.strerror(code)):
                read_values(path, 0, torch.float32, torch.zeros(NUMBERS), summed=False, past_cache=past_cache)


@pytest.mark.parametrize("past_cache", [True, False])
def test_reads_cut_short(path: Path, past_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    sizes = iter([4096, 0, 4096, 8192] * 100)

    def short(file: int, buffers: Any, at: int) -> int:
        return min(read(file, buffers, at), next(sizes) or 1 << 30)

    monkeypatch.setattr(os, "preadv", short)
    out = torch.zeros(NUMBERS)
    read_values(path, HEAD, torch.float32, out, summed=False, past_cache=past_cache)
    assert torch.equal(out, torch.arange(NUMBERS, dtype=torch.float32))


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_ends_before(path: Path, past_cache: bool, dtype: torch.dtype) -> None:
    size = path.stat().st_size
    for missing in (1, 4, 5000):
        os.truncate(path, size - missing)
        with pytest.raises(OSError, match=f"ends at byte {size - missing}$"):
            read_values(
                path,
                HEAD,
                torch.float32,
                torch.zeros(NUMBERS, dtype=dtype),
                summed=True,
                past_cache=past_cache,
            )
        with pytest.raises(OSError, match="ends at byte"):
            crc_of_range(path, HEAD, 4 * NUMBERS)
