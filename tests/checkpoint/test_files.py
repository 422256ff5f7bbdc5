"""The safetensors writer: what the library reads, in chunks, aligned, one tensor in memory at a time."""

import errno
import json
import os
import resource
import signal

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import Deferred
from megatron_lite.checkpoint import files as files_module
from megatron_lite.checkpoint.files import DTYPE_NAMES, crc_of_ranges, write_safetensors


def test_the_library_reads_it_and_the_checksums_hold_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_CHUNK", 64)
    tensors = {str(dtype): (torch.rand(3, 11) * 9).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.rand(5, 7).T}
    path = tmp_path / "x.safetensors"
    written = write_safetensors(path, tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys() == written.tensor_crcs.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert written.bytes == path.stat().st_size
    sizes = [written.header_bytes, *(tensors[n].numel() * tensors[n].itemsize for n in written.tensor_crcs)]
    assert crc_of_ranges(path, sizes) == [written.header_crc, *written.tensor_crcs.values()]


def test_every_tensor_is_aligned_to_its_own_width(tmp_path):
    path = tmp_path / "x.safetensors"
    odd = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.bfloat16)}
    written = write_safetensors(path, odd | {"c": torch.zeros(3), "d": torch.zeros(1, dtype=torch.int64)})
    assert written.header_bytes % 8 == 0
    header = json.loads(path.read_bytes()[8 : written.header_bytes])
    widths = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1}
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


def test_deferred_tensors_are_made_one_by_one(tmp_path):
    made = []

    def make(value):
        made.append(value)
        assert (tmp_path / "x.safetensors").stat().st_size >= (value - 1) * 4 << 18  # the others are written
        return torch.full((1 << 18,), float(value))

    deferred = {str(v): Deferred(torch.float32, (1 << 18,), lambda v=v: make(v)) for v in (1, 2, 3)}
    write_safetensors(tmp_path / "x.safetensors", deferred)
    assert made == [1, 2, 3]
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert [loaded[name][-1].item() for name in ("1", "2", "3")] == [1.0, 2.0, 3.0]


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


def test_a_disk_that_fails_on_the_way_is_heard(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(files_module, "_FLUSH", 100)
    with pytest.raises(OSError, match="Input/output error"):
        write_safetensors(tmp_path / "x", {"a": torch.zeros(30), "b": torch.zeros(2)})


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"x: torch.complex64 has no safetensors name"):
        write_safetensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())
