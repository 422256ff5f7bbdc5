import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import cache
from megatron_lite.data.cache import cached, content_stamp


class Builder:
    def __init__(self, value: int = 0) -> None:
        self.calls = 0
        self.value = value

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"a": np.arange(5) + self.value, "b": np.ones((2, 3), np.int32)}


def test_the_second_call_maps_what_the_first_built(tmp_path: Path) -> None:
    build = Builder()
    first = cached(tmp_path / "c", {"seed": 1}, build)
    second = cached(tmp_path / "c", {"seed": 1}, build)
    assert build.calls == 1
    assert isinstance(second["a"], np.memmap) and not second["a"].flags.writeable
    for name in ("a", "b"):
        np.testing.assert_array_equal(first[name], second[name])


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    cached(tmp_path, {"seed": 1}, Builder(0))
    assert cached(tmp_path, {"seed": 2}, Builder(7))["a"][0] == 7
    assert cached(tmp_path, {"seed": 1}, Builder(9))["a"][0] == 0


@pytest.mark.parametrize("name", ["a.npy", "b.npy", "key.json"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, name: str) -> None:
    cached(tmp_path, {"seed": 1}, Builder())
    (damaged,) = tmp_path.glob(f"*/{name}")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    build = Builder()
    assert cached(tmp_path, {"seed": 1}, build)["a"].tolist() == [0, 1, 2, 3, 4]
    cached(tmp_path, {"seed": 1}, build)
    assert build.calls == 1, "and stored again"


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_changed_byte_is_seen(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """An entry of the right size: a disk error, or a copy that did not end."""
    cached(tmp_path, {"seed": 1}, Builder())
    (damaged,) = tmp_path.glob(f"*/{name}.npy")
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    assert cached(tmp_path, {"seed": 1}, Builder())[name].tolist() == Builder()()[name].tolist()
    assert "is damaged: built again" in caplog.text
    build = Builder()
    cached(tmp_path, {"seed": 1}, build)
    assert build.calls == 0


def test_an_entry_of_an_older_version_is_built_again(tmp_path: Path) -> None:
    cached(tmp_path, {"seed": 1}, Builder())
    (record,) = tmp_path.glob("*/key.json")
    record.write_text('{"key": {}, "arrays": ["a", "b"]}')
    assert cached(tmp_path, {"seed": 1}, Builder())["a"].tolist() == [0, 1, 2, 3, 4]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cached(tmp_path, {"seed": 1}, Builder())
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    left = tmp_path / f"{entry.name}.tmp-{cache.socket.gethostname()}-abc"
    entry.rename(left)
    elsewhere = tmp_path / f"{entry.name}.tmp-another-node-abc"
    elsewhere.mkdir()
    cached(tmp_path, {"seed": 1}, Builder())
    assert entry.exists() and not left.exists() and elsewhere.exists(), "another node may be at work"


def test_it_says_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        cached(tmp_path, {"seed": 1}, Builder(), "train samples of x")
        cached(tmp_path, {"seed": 1}, Builder(), "train samples of x")
    assert [record.getMessage().partition(" in")[0] for record in caplog.records] == [
        "train samples of x: built",
        "train samples of x: found",
    ]


def test_a_missing_array_is_built_again(tmp_path: Path) -> None:
    cached(tmp_path, {"seed": 1}, Builder())
    next(tmp_path.glob("*/b.npy")).unlink()
    assert set(cached(tmp_path, {"seed": 1}, Builder())) == {"a", "b"}


def test_where_nothing_can_be_written_it_is_built_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    build = Builder()
    assert cached(tmp_path / "file" / "cache", {}, build)["a"].tolist() == [0, 1, 2, 3, 4]
    assert build.calls == 1


def test_an_error_of_building_is_not_swallowed(tmp_path: Path) -> None:
    def build() -> dict:
        raise KeyError("from build")

    with pytest.raises(KeyError):
        cached(tmp_path, {}, build)


def test_what_another_node_stored_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not reach other nodes: its ranks have mapped the files already."""

    def no_lock(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(cache.fcntl, "flock", no_lock)
    stored: list[int] = []

    def build() -> dict[str, np.ndarray]:
        cached(tmp_path, {"seed": 1}, Builder())  # the other node, faster
        stored.append(next(tmp_path.glob("*/a.npy")).stat().st_ino)
        return Builder()()

    assert cached(tmp_path, {"seed": 1}, build)["a"].tolist() == [0, 1, 2, 3, 4]
    assert [path.stat().st_ino for path in tmp_path.glob("*/a.npy")] == stored, "and nothing temporary"


def _start(directory: Path, built: "multiprocessing.Queue[int]", barrier: object) -> None:
    def build() -> dict[str, np.ndarray]:
        built.put(os.getpid())
        time.sleep(0.2)  # long enough for the others to come
        return {"a": np.arange(3)}

    barrier.wait()
    assert cached(directory, {"x": 1}, build)["a"].tolist() == [0, 1, 2]


def test_of_many_ranks_that_start_at_once_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    built, barrier = context.Queue(), context.Barrier(6)
    ranks = [context.Process(target=_start, args=(tmp_path / "c", built, barrier)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 6
    built.get(timeout=10)
    assert built.empty()
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == ["", ".lock"], "nothing temporary is left"


def test_the_stamp_is_of_the_content() -> None:
    values = np.arange(3_000_000, dtype=np.int32)
    changed = values.copy()
    changed[2_999_999] += 1
    assert content_stamp(values) == content_stamp(values.copy()) != content_stamp(changed)
