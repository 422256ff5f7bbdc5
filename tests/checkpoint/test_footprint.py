"""What reading costs a rank: the bytes it needs, and memory for its own state and one piece."""

import ctypes
import resource
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_lite.checkpoint import KINDS, Piece, Reader, save
from tests.distributed import run_ranks

SHAPE = (512, 4096)  # 8 MiB in fp32
WHOLE = SHAPE[0] * SHAPE[1]


class Part(NamedTuple):
    """Elements [low, high) of the slice [start, stop) along `dim`, flattened."""

    dim: int | None
    start: int
    stop: int
    low: int
    high: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        shard = whole if self.dim is None else whole.narrow(self.dim, self.start, self.stop - self.start)
        return shard.reshape(-1)[self.low : self.high]


def whole_of(kind: str) -> torch.Tensor:
    return torch.arange(WHOLE, dtype=torch.float32).view(SHAPE) + KINDS.index(kind)


def save_parts(folder: Path, parts: list[Part]) -> Path:
    pieces = [
        Piece("w", kind, SHAPE, part.dim, part.start, part.stop, part.low, part.of(whole_of(kind)))
        for kind in KINDS
        for part in parts
    ]
    return save(folder, 1, pieces, {})


def status(field: str, file: str = "status") -> int:
    text = Path(f"/proc/self/{file}").read_text()
    return int(text.partition(f"{field}:")[2].split()[0])


def mapped_bytes(folder: Path) -> int:
    """Bytes of the folder's files that this process has touched through a mapping of them."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def read_counting(path: Path, part: Part) -> tuple[int, int]:
    """Bytes read by system calls and by touching a mapping, while a part of every kind is read."""
    with Reader(path) as reader:
        before = status("rchar", "io")
        for kind in KINDS:
            target = torch.empty(part.high - part.low)
            reader.read_into(target, "w", kind, part.dim, part.start, part.stop, part.low)
            assert torch.equal(target, part.of(whole_of(kind)))
        return status("rchar", "io") - before, mapped_bytes(path)


ROWS = [Part(None, 0, 0, at, at + WHOLE // 4) for at in range(0, WHOLE, WHOLE // 4)]
COLUMNS = [Part(1, at, at + 2048, 0, WHOLE // 2) for at in range(0, 4096, 2048)]


@pytest.mark.parametrize(
    ("source", "target", "ways"),
    [
        (ROWS, Part(None, 0, 0, 1001, 700_001), {"calls"}),  # over the border of two pieces
        (ROWS, Part(0, 128, 256, 5, 70_000), {"calls"}),
        (COLUMNS, Part(1, 0, 2048, 3, 300_000), {"calls"}),
        (COLUMNS, Part(None, 0, 0, 409_600, 819_200), {"mapping"}),  # rows, of which each piece has a half
    ],
    ids=["flat", "rows", "columns", "rows of columns"],
)
def test_only_the_bytes_that_are_needed_are_read(
    source: list[Part], target: Part, ways: set[str], tmp_path: Path
) -> None:
    path = save_parts(tmp_path, source)
    ((calls, mapped),) = run_ranks(1, read_counting, path, target)
    own = 3 * 4 * (target.high - target.low)
    # The files of /proc that count are read too; beside a page that is touched Linux maps up to half a megabyte.
    slack = (64 << 10) + 6 * (1 << 20) * ("mapping" in ways)
    assert own <= calls + mapped <= own + slack
    assert (calls >= own) == ("calls" in ways)
    assert own + slack < 3 * 4 * WHOLE / 2, "far from all of it"


def load_within_limits(path: Path, part: Part, dtype: torch.dtype, extra: int) -> None:
    threading.stack_size(256 << 10)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: a tensor freed is given back, not kept by luck
    own = {kind: torch.zeros(part.high - part.low, dtype=dtype) for kind in KINDS}
    with Reader(path) as reader:
        reader.read_flat(
            "w", "weight", None, 0, None, 0, 2 * SHAPE[1]
        )  # files mapped count as data once they are
        limit = (status("VmData") << 10) + extra
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # of memory that is not a file's
        for kind, target in own.items():
            reader.read_into(target, "w", kind, part.dim, part.start, part.stop, part.low)


@pytest.mark.parametrize("source", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("dtype", "extra"),
    # In the type that is stored, it goes where it belongs; in another, one tensor at a time is beside it.
    [(torch.float32, 3 << 20), (torch.bfloat16, (3 << 20) + WHOLE // 2 * 4)],
    ids=["fp32", "bf16"],
)
def test_memory_is_the_ranks_own_and_one_piece(
    source: list[Part], dtype: torch.dtype, extra: int, tmp_path: Path
) -> None:
    path = save_parts(tmp_path, source)
    run_ranks(
        1, load_within_limits, path, Part(None, 0, 0, WHOLE // 3, WHOLE // 3 + WHOLE // 2), dtype, extra
    )
