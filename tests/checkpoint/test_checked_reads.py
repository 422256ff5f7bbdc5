"""Checksums are compared while pieces are read, and what is left over is read through once, by all ranks together."""

import itertools
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import KINDS, CheckpointError, DamagedCheckpoint, Reader
from megatron_lite.checkpoint import reader as module
from tests.checkpoint.ranks import Gather, cut, layout, random_state, save_state

SOURCE = (2, 1, 2, 1)
FC2 = "blocks.0.mlp.linear_fc2.weight"


@pytest.fixture
def read_through(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The file and first byte of everything that `verify` reads."""
    found: list[tuple[str, int]] = []
    original = module.crc_of_range

    def noted(path: Path, begin: int, size: int) -> int:
        found.append((path.name, begin))
        return original(path, begin, size)

    monkeypatch.setattr(module, "crc_of_range", noted)
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def load(reader: Reader, owned: list, state: dict) -> None:
    """What a rank owns, into tensors of its own, side by side."""
    jobs, wanted = [], []
    for (name, (dim, start, stop, low, high)), kind in itertools.product(owned, KINDS):
        target = torch.full((high - low,), torch.nan)
        wanted.append((target, cut(state[kind][name], dim, start, stop, low, high)))
        jobs.append([lambda t=target, at=(name, kind, dim, start, stop, low): reader.read_into(t, *at)])
    reader.side_by_side(jobs)
    assert all(torch.equal(target, expected) for target, expected in wanted)


def on_ranks(path: Path, target: tuple[int, int, int, int], state: dict | None) -> list[str | None]:
    """Every rank of a layout loads its part (`state` None: without comparing) and verifies; what each raised."""
    owned = layout(*target)
    gather, outcome = Gather(len(owned)), [None] * len(owned)

    def run(rank: int) -> None:
        with Reader(path, check=True) as reader:
            for name, (dim, start, stop, low, high) in owned[rank] if state is None else []:
                for kind in KINDS:
                    reader.read_flat(name, kind, dim, start, stop, low, high)
            if state is not None:
                load(reader, owned[rank], state)
            try:
                reader.verify(rank=rank, world_size=len(owned), gather=gather.of(rank))
            except DamagedCheckpoint as error:
                outcome[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(owned))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcome


def test_what_was_read_whole_is_not_read_again(tmp_path: Path, read_through: list[tuple[str, int]]) -> None:
    state = random_state(0)
    path = save_state(tmp_path, 1, state, *SOURCE)
    assert on_ranks(path, SOURCE, state) == [None] * 4
    assert sorted(read_through) == [(f"rank_{rank:05d}.safetensors", 0) for rank in range(4)], "headers alone"


@pytest.mark.parametrize("target", [(1, 1, 1, 0), (2, 1, 3, 3), (4, 2, 1, 1), (1, 1, 7, 1)], ids=str)
def test_what_no_rank_read_whole_is_read_by_one(
    target: tuple[int, int, int, int], tmp_path: Path, read_through: list[tuple[str, int]]
) -> None:
    state = random_state(0)
    path = save_state(tmp_path, 1, state, *SOURCE)
    assert on_ranks(path, target, state) == [None] * len(layout(*target))
    assert read_through and set(Counter(read_through).values()) == {1}
    # On every byte of which nobody is sure, and on no rank more than on the others: see the flipped bits.
    assert len(read_through) < sum(len(entry.pieces) + 1 for entry in Reader(path)._files.values())


@pytest.mark.parametrize("target", [SOURCE, (1, 1, 1, 0), (2, 1, 3, 3)], ids=str)
def test_every_rank_raises_what_one_found(target: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = save_state(tmp_path, 1, random_state(0), *SOURCE)
    for file in sorted(path.glob("rank_*")):
        for at in range(3, file.stat().st_size, 97):
            flip(file, at)
            (message,) = set(on_ranks(path, target, None))
            assert message is not None and message.count("is damaged") == 1
            assert f"{file} is damaged: " in message and message.endswith(
                "; use another step or restore the file"
            )
            flip(file, at)
    assert set(on_ranks(path, target, None)) == {None}


def test_damage_is_noted_until_it_is_asked_for(tmp_path: Path, read_through: list[tuple[str, int]]) -> None:
    path = save_state(tmp_path, 1, random_state(0))
    file = path / "rank_00000.safetensors"
    with Reader(path) as reader:
        offsets = reader._files[file.name].offsets()
        begin = next(at for key, at in offsets.items() if key.startswith(f"weight/{FC2}/"))
    flip(file, begin + 8)
    with Reader(path, check=True) as reader:
        reader.read(FC2)  # damaged, and still here for verify to say
        for _ in range(2):
            with pytest.raises(DamagedCheckpoint, match=rf"is damaged: weight/{FC2}"):
                reader.verify("weight")
    assert (file.name, begin) not in read_through
    with Reader(path, check=True) as reader:
        file.rename(path / "elsewhere")
        reader.read(FC2)
        (path / "elsewhere").rename(file)  # too late: what was to be read was not
        with pytest.raises(
            DamagedCheckpoint, match=r"rank_00000.safetensors cannot be read \(.*No such file"
        ):
            reader.verify()
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Reader(path, check=True)


def test_the_index_is_checked_by_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = save_state(tmp_path, 1, random_state(0), *SOURCE), []

    def refuse(pieces: object) -> None:
        asked.append(pieces)
        raise CheckpointError("a hole")

    monkeypatch.setattr(module, "check_coverage", refuse)
    (message,) = set(on_ranks(path, SOURCE, None))
    assert message is not None and "index.json: a hole" in message and len(asked) == 1
