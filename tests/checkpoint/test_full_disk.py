"""A disk that is really full, and a folder that is really read-only: a small one, mounted for one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import CheckpointError, Piece, Reader, find_latest, save

# A namespace of its own, in which a process may mount without being root.
PRIVATE = ["unshare", "--map-root-user", "--mount"]


def test_full_and_read_only(tmp_path: Path) -> None:
    try:
        probe = ["sh", "-c", f"mount -t tmpfs none {tmp_path}"]
        subprocess.run([*PRIVATE, *probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    call = f"from {__name__} import on_a_small_disk; on_a_small_disk({str(tmp_path)!r})"
    command = [*PRIVATE, sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def on_a_small_disk(folder: str) -> None:
    mount(folder, "-t", "tmpfs", "-o", "size=1m", "none")
    directory = Path(folder)
    save(directory, 1, pieces(100, value=1.0), {})
    with pytest.raises(
        CheckpointError,
        match=r"step_00000002 was not saved: .* No space left on device: '.*rank_00000\.safetensors'",
    ):
        save(directory, 2, pieces(300_000, value=2.0), {})
    assert_only(directory, step=1)
    save(directory, 3, pieces(200_000, value=3.0), {}, keep=1)  # there is room again, and then there is not
    with pytest.raises(
        CheckpointError, match=r"step_00000004 was not saved: .* No space left .* as they were"
    ):
        save(directory, 4, pieces(200_000, value=4.0), {}, keep=1)
    assert_only(directory, step=3)
    mount(folder, "-o", "remount,ro")
    with pytest.raises(
        CheckpointError, match=r"step_00000005 was not saved: preparing the folder: .* Read-only"
    ):
        save(directory, 5, pieces(10, value=5.0), {})
    assert_only(directory, step=3)


def mount(folder: str, *options: str) -> None:
    subprocess.run(["mount", *options, folder], check=True)


def pieces(size: int, value: float) -> list[Piece]:
    return [Piece.whole("a", "weight", torch.full((size,), value))]


def assert_only(directory: Path, step: int) -> None:
    found = find_latest(directory, checksums=True)
    assert sorted(path.name for path in directory.iterdir()) == ["latest", f"step_{step:08d}"]
    assert found is not None
    with Reader(found) as reader:
        assert reader.step == step and (reader.read("a") == step).all()
