"""Checksums are compared while pieces are read, and what is left over is read through once, by all ranks together."""

import itertools
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import KINDS, CheckpointError, DamagedCheckpoint, Reader, side_by_side
from megatron_lite.checkpoint import reader as module
from megatron_lite.checkpoint.index import key_of
from megatron_lite.checkpoint.layout import Stored
from tests.checkpoint.ranks import Gather, cut, layout, random_state, save_state

SOURCE = (2, 1, 2, 1)
FC2 = "blocks.0.mlp.linear_fc2.weight"


@pytest.fixture
def read_through(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The file and first byte of everything that `verify` reads."""
    found: list[tuple[str, int]] = []
    original, is_sound = module.crc_of_range, Reader._is_sound
    mapping = threading.local()

    def noted(path: Path, begin: int, size: int) -> int:
        if not getattr(mapping, "now", False):
            found.append((path.name, begin))
        return original(path, begin, size)

    def noted_mapping(reader: Reader, file: str, piece: Stored) -> bool:
        mapping.now = True
        try:
            return is_sound(reader, file, piece)
        finally:
            mapping.now = False

    monkeypatch.setattr(module, "crc_of_range", noted)
    monkeypatch.setattr(Reader, "_is_sound", noted_mapping)
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
    side_by_side(jobs)
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
        ranges = reader._files[file.name].ranges()
        begin = next(held.begin for key, held in ranges.items() if key.startswith(f"weight/{FC2}/"))
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


@pytest.mark.parametrize("where", ["the piece", "the header"])
def test_what_is_damaged_is_not_mapped(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of another cut are copied out of a mapping, which a bad sector would turn into the process's end."""
    path = save_state(tmp_path, 1, random_state(0), *SOURCE)
    with Reader(path) as reader:
        name, piece = reader._pieces["weight", FC2][0]
        begin = reader._files[name].ranges()[key_of(piece)].begin
    file = path / name
    flip(file, 20 if where == "the header" else begin)
    mapped: list[str] = []
    original = Reader._map
    monkeypatch.setattr(
        Reader, "_map", lambda reader, name, *rest: [mapped.append(name), original(reader, name, *rest)][1]
    )
    with Reader(path, check=True) as reader:
        for start in range(0, 12, 3):
            reader.read(FC2, dim=1, start=start, stop=start + 3)
        assert set(mapped) and file.name not in mapped
        with pytest.raises(DamagedCheckpoint, match=rf"{file.name} is damaged") as error:
            reader.verify()
        assert str(error.value).count("is damaged") == 1


def test_bytes_that_are_other_when_read_again_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = save_state(tmp_path, 1, random_state(0)), Counter[int]()
    original = module.read_values

    def other(file: Path, begin: int, dtype: torch.dtype, out: torch.Tensor, **options: bool) -> int:
        seen[begin] += 1
        crc = original(file, begin, dtype, out, **options)
        return crc ^ (seen[begin] == 2)

    monkeypatch.setattr(module, "read_values", other)
    with Reader(path, check=True) as reader:
        for _ in range(2):
            reader.read(FC2)
        with pytest.raises(DamagedCheckpoint, match=FC2):
            reader.verify()


def test_nothing_is_written_any_more_when_a_read_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 16)
    path, original = save_state(tmp_path, 1, random_state(0)), module.read_values
    begun, failed = threading.Event(), threading.Event()

    def slow(file: Path, begin: int, dtype: torch.dtype, out: torch.Tensor, **options: bool) -> int:
        if not begun.is_set():
            begun.set()
            failed.wait(60)
        elif not failed.is_set():
            failed.set()
            raise OSError("no such sector")
        else:
            failed.wait(60)
            threading.Event().wait(0.3)
        return original(file, begin, dtype, out, **options)

    monkeypatch.setattr(module, "read_values", slow)
    target = torch.zeros(60)
    with Reader(path) as reader, pytest.raises(DamagedCheckpoint, match="no such sector"):
        reader.read_into(target, FC2, "weight", None, 0, None, 0)
    then = target.clone()
    threading.Event().wait(0.7)
    assert torch.equal(target, then)


def test_as_many_faults_are_gathered_as_are_told(tmp_path: Path) -> None:
    path = save_state(tmp_path, 1, random_state(0))
    file = path / "rank_00000.safetensors"
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    gathered: list[object] = []

    def gather(value: object) -> list[object]:
        gathered.append(value)
        return [value]

    with (
        Reader(path) as reader,
        pytest.raises(DamagedCheckpoint, match="; and more; use another step") as error,
    ):
        reader.verify(gather=gather)
    assert str(error.value).count("is damaged") == 8
    faults = gathered[-1]
    assert isinstance(faults, list) and len(faults) == 9
