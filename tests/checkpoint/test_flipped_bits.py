"""A single flipped bit, anywhere in a run's checkpoints, is found, and the message says where it is."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import CheckpointError, Piece, Reader, find_latest, save
from tests.checkpoint.ranks import random_state, save_state

NEWEST = "step_00000130"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps whose names are a bit apart, the newest by four ranks."""
    directory = tmp_path_factory.mktemp("run")
    for step in (30, 110, 120):
        save_state(directory, step, random_state(step))
    save_state(directory, 130, random_state(130), 2, 1, 2, 3)
    return directory


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[int]:
    """Yields the position of the byte whose bit is another."""
    intact = path.read_bytes()
    at = bit // 8 % len(intact)
    path.write_bytes(intact[:at] + bytes([intact[at] ^ 1 << bit % 8]) + intact[at + 1 :])
    try:
        yield at
    finally:
        path.write_bytes(intact)


def piece_at(path: Path, at: int) -> str:
    """What a safetensors file holds at a byte."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            if begin <= at < end:
                return str(key)
    return "its header"


@settings(max_examples=150)
@given(number=st.integers(0, 3), bit=st.integers(0, 1 << 20))
def test_in_a_ranks_file(folder: Path, number: int, bit: int) -> None:
    path = folder / NEWEST / f"rank_{number:05d}.safetensors"
    piece = piece_at(path, bit // 8 % path.stat().st_size)
    with flipped(path, bit), Reader(folder / NEWEST) as reader:
        with pytest.raises(CheckpointError) as error:
            reader.verify()
        assert f"{path} is damaged: {piece} does not match its checksum; " in str(error.value)
        assert str(error.value).count("is damaged") == 1
        assert find_latest(folder, checksums=True) == folder / "step_00000120"


@settings(max_examples=300)
@given(bit=st.integers(0, 1 << 20))
def test_in_the_index(folder: Path, bit: int) -> None:
    path = folder / NEWEST / "index.json"
    with flipped(path, bit):
        with pytest.raises(CheckpointError, match=re.escape(f"{path} ")):
            Reader(folder / NEWEST)
        assert find_latest(folder) == folder / "step_00000120"


def test_in_any_bit_of_latest(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "latest"
    assert find_latest(folder) == folder / NEWEST and not caplog.records
    for bit in range(8 * path.stat().st_size):
        caplog.clear()
        with flipped(path, bit):
            assert find_latest(folder) == folder / NEWEST
        assert [record.getMessage() for record in caplog.records] == [
            f"{path} is damaged; the checkpoint of the highest step counts"
        ], bit


def test_in_what_is_the_same_number(tmp_path: Path) -> None:
    path = save(tmp_path, 1, [Piece.whole("a", "weight", torch.ones(2))], {"lr": 1e-5}) / "index.json"
    text = path.read_text()
    assert text.count("1e-05") == 1
    path.write_text(text.replace("1e-05", "1E-05"))
    with pytest.raises(CheckpointError, match=r"index\.json does not match its own checksum"):
        Reader(path.parent)


@pytest.mark.parametrize("indent", [None, 2])
def test_in_a_reformatted_index(tmp_path: Path, indent: int | None) -> None:
    path = save(tmp_path, 1, [Piece.whole("a", "weight", torch.ones(2))], {"lr": 1e-5}) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=indent))
    with pytest.raises(CheckpointError, match=r"index\.json does not match its own checksum"):
        Reader(path.parent)


def test_a_latest_of_an_older_release_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 3, 2):
        save_state(tmp_path, step, random_state(0))
    (tmp_path / "latest").write_text("step_00000002\n")
    assert find_latest(tmp_path) == tmp_path / "step_00000002" and not caplog.records
