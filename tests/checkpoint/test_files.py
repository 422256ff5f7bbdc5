"""The safetensors writer: what the library reads, in chunks, aligned, one tensor in memory at a time."""

import errno
import fcntl
import json
import os
import resource
import signal
import weakref
import zlib

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import Deferred
from megatron_lite.checkpoint import blocks as blocks_module
from megatron_lite.checkpoint.files import DTYPE_NAMES, write_safetensors
from megatron_lite.checkpoint.ranges import crc_of_range


@pytest.mark.parametrize("way", ["as it is", "no way past the cache", "another alignment"])
def test_the_library_reads_it_and_the_checksums_hold_over_blocks(tmp_path, monkeypatch, way):
    monkeypatch.setattr(blocks_module, "_BLOCK", 4096)
    monkeypatch.setattr(blocks_module, "_AT_ONCE", 2)
    if way == "no way past the cache":  # as a file system without it, which refuses the flag
        flagged = lambda file, command, flags=0: flags & os.O_DIRECT  # noqa: E731
        monkeypatch.setattr(fcntl, "fcntl", refuse(flagged, fcntl.fcntl))
    elif way == "another alignment":
        direct = lambda file, *_: fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT  # noqa: E731
        monkeypatch.setattr(os, "pwrite", refuse(direct, os.pwrite))
    tensors = {str(dtype): (torch.rand(3, 11) * 9).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {
        "long": torch.rand(5000),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.rand(5, 7).T,
    }
    path = tmp_path / "x.safetensors"
    written = write_safetensors(path, tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys() == written.tensor_crcs.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert written.bytes == path.stat().st_size
    sizes = [written.header_bytes, *(tensors[n].numel() * tensors[n].itemsize for n in written.tensor_crcs)]
    begins = [sum(sizes[:at]) for at in range(len(sizes))]
    data, sums = path.read_bytes(), [written.header_crc, *written.tensor_crcs.values()]
    assert [zlib.crc32(data[at : at + size]) for at, size in zip(begins, sizes, strict=True)] == sums
    assert [crc_of_range(path, *at) for at in zip(begins, sizes, strict=True)] == sums


def refuse(when, function):
    def call(*args):
        if when(*args):
            raise OSError(errno.EINVAL, "Invalid argument")
        return function(*args)

    return call


def test_a_write_cut_short_is_taken_up_where_it_ended(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda file, data, begin: write(file, data[: min(len(data), 4096)], begin)
    )
    tensor = torch.rand(300_000)
    write_safetensors(tmp_path / "x", {"x": tensor})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["x"], tensor)
    # Not at a sector's end: what follows goes through the page cache.
    monkeypatch.setattr(os, "pwrite", lambda file, data, begin: unaligned(file, data, begin, write))
    write_safetensors(tmp_path / "y", {"x": tensor})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "y")["x"], tensor)


def unaligned(file, data, begin, write):
    if len(data) < 5000 or begin % 4096:
        return write(file, data, begin)
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    count = write(file, data[:5000], begin)
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return count


def test_every_tensor_is_aligned_to_its_own_width(tmp_path):
    path = tmp_path / "x.safetensors"
    odd = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.bfloat16)}
    written = write_safetensors(path, odd | {"c": torch.zeros(3), "d": torch.zeros(1, dtype=torch.int64)})
    assert written.header_bytes % 8 == 0
    header = json.loads(path.read_bytes()[8 : written.header_bytes])
    widths = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1}
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


def test_deferred_tensors_are_made_one_ahead(tmp_path):
    made = []

    def make(value):
        assert sum(tensor() is not None for tensor in made) <= 1  # the others are written, and gone
        tensor = torch.full((1 << 18,), float(value))
        made.append(weakref.ref(tensor))
        return tensor

    deferred = {str(v): Deferred(torch.float32, (1 << 18,), lambda v=v: make(v)) for v in range(1, 9)}
    write_safetensors(tmp_path / "x.safetensors", deferred)
    assert len(made) == 8
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(loaded[str(v)].eq(v).all() for v in range(1, 9))


def test_room_for_all_of_it_is_asked_for_before_anything_is_written(tmp_path):
    """In a child, where files may have a megabyte."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_safetensors(tmp_path / "x", {"x": torch.zeros(1 << 19)})
        except OSError as error:
            os._exit(error.errno == errno.EFBIG and (tmp_path / "x").stat().st_size == 0)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_disk_that_fails_on_the_way_is_heard(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "pwrite", raising(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_safetensors(tmp_path / "x", {"a": torch.zeros(30), "b": torch.zeros(2)})


def test_a_disk_that_takes_nothing_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda file, data, begin: 0)
    with pytest.raises(OSError, match="takes no more of it"):
        write_safetensors(tmp_path / "x", {"a": torch.zeros(30)})


def test_the_page_cache_is_passed_by(tmp_path, monkeypatch):
    """Where the file system can, and until the last bytes."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this file system cannot: {error}")
    seen, write = [], os.pwrite

    def spy(file, data, begin):
        seen.append(bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT))
        return write(file, data, begin)

    monkeypatch.setattr(os, "pwrite", spy)
    write_safetensors(tmp_path / "x", {"a": torch.zeros(3_000_000)})
    assert seen == [True] * 3


def test_no_file_stays_open(tmp_path, monkeypatch):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for call, code in (("mmap.mmap", errno.ENOMEM), ("os.pwrite", errno.EIO), ("os.fsync", errno.EIO)):
        with monkeypatch.context() as patch:
            patch.setattr(call, raising(code))
            with pytest.raises(OSError, match=os.strerror(code)):
                write_safetensors(tmp_path / call, {"a": torch.zeros(30)})
    assert count() == before


def raising(code):
    def call(*_):
        raise OSError(code, os.strerror(code))

    return call


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"x: torch.complex64 has no safetensors name"):
        write_safetensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())
