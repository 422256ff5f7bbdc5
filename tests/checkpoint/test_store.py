"""Saving harms nothing already saved, whatever happens meanwhile."""

import builtins
import contextlib
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import CheckpointError, Piece, Reader, find_latest, save
from megatron_lite.checkpoint import blocks as blocks_module
from megatron_lite.checkpoint import files as files_module
from megatron_lite.checkpoint.store import save_files
from tests.checkpoint.ranks import SHAPES, layout, pieces_of, random_state, save_all, save_state


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What a dead process wrote stays without fsync; a power cut, which needs it, has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


SECTOR = 4096
STEPS = ("mkdir", "rmdir", "unlink", "replace", "fsync", "ftruncate")


class Interrupter:
    """Does something nasty instead of the n-th step that changes the disk; counts the steps.

    A write is two steps: before it, and with half of it done.
    """

    def __init__(self, at, action):
        self.at, self.action, self.seen = at, action, 0

    def step(self):
        self.seen += 1
        if self.seen == self.at:
            self.action()

    def install(self, monkeypatch):
        monkeypatch.setattr(blocks_module, "_BLOCK", 2 * SECTOR)  # so that there are many
        monkeypatch.setattr(blocks_module, "_AT_ONCE", 2)
        for name in STEPS:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        monkeypatch.setattr(os, "open", self.opened(os.open))
        monkeypatch.setattr(os, "pwrite", self.written(os.pwrite))
        monkeypatch.setattr(files_module, "open", self.open, raising=False)

    def wrapped(self, function):
        def call(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)

        return call

    def opened(self, function):
        def call(path, flags, mode=0o777, **kwargs):
            if flags & os.O_CREAT:
                self.step()
            return function(path, flags, mode, **kwargs)

        return call

    def written(self, function):
        def call(file, data, begin):
            self.step()
            if half := len(data) // 2 // SECTOR * SECTOR:
                function(file, data[:half], begin)
                self.step()
            return half + function(file, data[half:], begin + half)

        return call

    def open(self, path, mode="r", buffering=-1):
        if "r" in mode:
            return builtins.open(path, mode, buffering)
        self.step()
        # Unbuffered, so that what is written is in the file.
        file = builtins.open(path, mode, buffering=0)  # noqa: SIM115
        return HalfWriter(file, self)


class HalfWriter:
    def __init__(self, file, interrupter):
        self.file, self.interrupter = file, interrupter

    def write(self, data):
        self.interrupter.step()
        self.file.write(data[: len(data) // 2])
        self.interrupter.step()
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@contextlib.contextmanager
def forked():
    """Yields 0 in a child, which ends with the block, and the child's id in the parent."""
    child = os.fork()
    try:
        yield child
    finally:
        if child == 0:
            os._exit(1)


def assert_whole(path, seed):
    """The checkpoint holds the state of this seed, bit for bit."""
    state = random_state(seed)
    with Reader(path) as reader:
        reader.verify()
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                assert torch.equal(reader.read(name, kind), tensor)


def save_one(directory, step, seed, keep=2):
    (owned,) = layout(1, 1, 1, 0)
    return save(directory, step, pieces_of(random_state(seed), owned), {"seed": seed}, keep=keep)


def prepare(directory):
    """Steps 10 and 20, each of its own seed, and what an earlier killed save left."""
    save_one(directory, 10, seed=10)
    save_one(directory, 20, seed=20)
    (directory / "step_00000025.tmp").mkdir()
    (directory / "step_00000025.tmp" / "rank_00000.safetensors").write_bytes(b"half")


def count_steps(directory, step, monkeypatch):
    prepare(directory)
    counter = Interrupter(0, None)
    with monkeypatch.context() as patch:
        counter.install(patch)
        save_one(directory, step, seed=99)
    return counter.seen


def assert_nothing_lost(directory, step):
    """Whatever was interrupted, a whole checkpoint is found, and the next save puts everything right."""
    found = find_latest(directory, checksums=True)
    with Reader(found) as reader:
        seed, at = reader.metadata["seed"], reader.step
    assert (at, seed) in {(20, 20), (step, 99)}, "older than the last one that was reported as saved"
    assert_whole(found, seed)
    save_one(directory, step, seed=7)
    assert find_latest(directory) == directory / f"step_{step:08d}"
    assert_whole(directory / f"step_{step:08d}", 7)
    left = sorted(path.name for path in directory.iterdir())
    kept = {30: ["step_00000020", "step_00000030"], 20: ["step_00000010", "step_00000020"]}[step]
    assert left == ["latest", *kept]


@pytest.mark.parametrize("step", [30, 20], ids=["new step", "same step again"])
def test_a_kill_at_any_step_loses_nothing(tmp_path, monkeypatch, step):
    total = count_steps(tmp_path / "count", step, monkeypatch)
    assert total > 20
    for at in range(1, total + 1):
        directory = tmp_path / str(at)
        prepare(directory)
        with forked() as child:  # a real death: nothing is flushed, closed or tidied up
            if child == 0:
                Interrupter(at, lambda: os._exit(9)).install(monkeypatch)
                save_one(directory, step, seed=99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert_nothing_lost(directory, step)


@pytest.mark.parametrize("step", [30, 20], ids=["new step", "same step again"])
def test_a_full_disk_at_any_step_loses_nothing(tmp_path, monkeypatch, caplog, step):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    outcomes = set()
    for at in range(1, count_steps(tmp_path / "count", step, monkeypatch) + 1):
        directory = tmp_path / str(at)
        prepare(directory)
        caplog.clear()
        with monkeypatch.context() as patch:
            Interrupter(at, full).install(patch)
            try:
                save_one(directory, step, seed=99)
            except CheckpointError as error:
                assert "No space left on device" in str(error) and "was not saved" in str(error)
                outcomes.add("raised")
            else:  # the save was done, and tidying up was not
                assert_whole(find_latest(directory), 99)
                if "could not be removed: [Errno 28]" in caplog.text:
                    outcomes.add("warned")
        assert_nothing_lost(directory, step)
    assert outcomes == {"raised", "warned"}


@pytest.mark.parametrize("how", ["save", "save_files"])
def test_the_disk_has_everything_before_it_has_its_name(tmp_path, monkeypatch, how):
    """What a power cut needs and no kill shows: files, their folder, the rename, the pointer, in order."""
    events = []
    fsync, replace, truncate = os.fsync, os.replace, os.ftruncate

    def spy_fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"fsync {path.relative_to(tmp_path)}")
        fsync(descriptor)

    def spy_truncate(descriptor, size):
        events.append("cut to its size")
        truncate(descriptor, size)

    def spy_replace(source, target):
        events.append(f"rename {Path(target).relative_to(tmp_path)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "ftruncate", spy_truncate)
    if how == "save":
        save_one(tmp_path / "checkpoints", 1, seed=1)
    else:
        save_files(tmp_path, 1, [[Piece.whole("a", "weight", torch.ones(5))]], {})
    temporary = "step_00000001.tmp"
    assert events.pop(0) == "fsync ."
    assert [event.replace("checkpoints/", "").replace("checkpoints", ".") for event in events] == [
        "cut to its size",
        f"fsync {temporary}/rank_00000.safetensors",
        f"fsync {temporary}/index.json.tmp",
        f"rename {temporary}/index.json",
        f"fsync {temporary}",
        "rename step_00000001",
        "fsync .",
        "fsync latest.tmp",
        "rename latest",
        "fsync .",
    ]


def test_kill_9_at_random_moments_resumes_from_the_last_reported(tmp_path):
    rng = random.Random(11)
    reported = 0
    for _ in range(20):
        read, write = os.pipe()
        with forked() as child:
            if child == 0:
                for step in range(reported + 1, reported + 10_000):
                    save_one(tmp_path, step, seed=step, keep=1)
                    os.write(write, step.to_bytes(4, "little"))
        os.close(write)
        with open(read, "rb") as pipe:
            told = pipe.read(4 * rng.randint(1, 3))
            time.sleep(rng.uniform(0.0, 0.01))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told += pipe.read()
        assert told
        reported = int.from_bytes(told[-4:], "little")
        found = find_latest(tmp_path, checksums=True)
        with Reader(found) as reader:
            assert reader.step >= reported
        assert_whole(found, reader.step)


def test_a_leftover_that_cannot_be_removed_stops_no_save(tmp_path, monkeypatch, caplog):
    prepare(tmp_path)
    remove = shutil.rmtree

    def refuse(path, **options):
        if Path(path).name == "step_00000025.tmp" and not options:
            raise OSError(
                errno.ENOTEMPTY, "Directory not empty"
            )  # as where another machine has a file of it open
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert_whole(save_one(tmp_path, 30, seed=30), 30)
    assert "step_00000025.tmp could not be removed: [Errno 39]" in caplog.text
    with pytest.raises(CheckpointError, match=r"step_00000025 was not saved: preparing the folder: rank 0"):
        save_one(tmp_path, 25, seed=25)


def test_a_step_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch):
    prepare(tmp_path)
    replace = os.replace

    def refuse(source, target):
        if Path(source).name == "step_00000020.tmp" and Path(target).name == "step_00000020":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="step_00000020 was not saved: publishing"):
        save_one(tmp_path, 20, seed=99)
    assert_whole(tmp_path / "step_00000020", 20)


@pytest.mark.parametrize("keep", [0, 5])
def test_what_a_killed_save_had_replaced_goes_with_the_next_save(tmp_path, keep):
    prepare(tmp_path)
    shutil.copytree(tmp_path / "step_00000020", tmp_path / "step_00000020.old")
    (tmp_path / "step_00000010").rename(tmp_path / "step_00000010.old")  # nothing is in its place yet
    save_one(tmp_path, 30, seed=30, keep=keep)
    steps = sorted(path.name for path in tmp_path.glob("step_*"))
    assert steps == ["step_00000010.old", "step_00000020", "step_00000030"]


def test_files_are_written_where_no_checkpoint_is(tmp_path):
    """What a run has saved is not replaced, nor its `latest` moved, by a conversion into its folder."""
    prepare(tmp_path / "checkpoints")
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    for step in (10, 15, 40):
        with pytest.raises(CheckpointError, match="holds checkpoints already; give another folder"):
            save_files(tmp_path, step, [[Piece.whole("a", "weight", torch.ones(5))]], {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    piece = Piece.whole("a", "weight", torch.ones(5))
    with pytest.raises(CheckpointError, match="is given twice"):
        save_files(tmp_path / "new", 1, [[piece, piece]], {})
    with pytest.raises(CheckpointError, match="is there twice"):
        save_files(tmp_path / "new", 1, [[piece], [piece]], {})
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path, monkeypatch):
    save_state(tmp_path, 1, random_state(1), 2, 1, 2, 1)
    ranks = [pieces_of(random_state(2), owned) for owned in layout(2, 1, 2, 1)]
    original = files_module.write_safetensors

    def fail(path, *args):
        if path.name == "rank_00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *args)

    monkeypatch.setattr("megatron_lite.checkpoint.store.write_safetensors", fail)
    outcome = save_all(tmp_path, 2, ranks)
    assert len(outcome) == 4
    for error in outcome:
        assert isinstance(error, CheckpointError)
        assert "writing the pieces: rank 2: [Errno 28] No space left on device" in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert_whole(find_latest(tmp_path, checksums=True), 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ranks: ranks[1].clear(), "embed.weight .*: 12:24 is missing"),
        (lambda ranks: ranks[1].extend(ranks[0][:1]), "embed.weight .*: 0:60 is there twice"),
        (lambda ranks: ranks[0].append(ranks[0][0]), "rank 0: piece of embed.weight .weight. is given twice"),
        (
            lambda ranks: ranks[1].append(Piece.whole("odd", "weight", torch.ones(2, dtype=torch.complex64))),
            "rank 1: piece of odd .weight.: torch.complex64 cannot be stored",
        ),
    ],
)
def test_pieces_that_do_not_add_up_are_refused_on_all_ranks(tmp_path, change, says):
    ranks = [pieces_of(random_state(0), owned) for owned in layout(2, 1, 1, 0)]
    change(ranks)
    for error in save_all(tmp_path, 1, ranks):
        with pytest.raises(CheckpointError, match=says):
            raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [{"loss": float("nan")}, {"path": Path("x")}])
def test_metadata_must_be_json(tmp_path, metadata):
    for error in save_all(tmp_path, 1, [[], []], metadata):
        assert isinstance(error, CheckpointError) and "JSON" in str(error)


def test_metadata_comes_back_as_json_has_it(tmp_path):
    metadata = {
        "config": {"model": {"hidden_size": 8}},
        "steps": {2: 3, 10: 4},
        "scale": 0.1,
        "rng": [1, None],
    }
    path = save(tmp_path, 1, [Piece.whole("a", "weight", torch.ones(2))], metadata)
    assert Reader(path).metadata == metadata | {"steps": {"2": 3, "10": 4}}


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    for error in save_all(tmp_path / "file" / "checkpoints", 1, [[], []]):
        assert isinstance(error, CheckpointError) and "preparing the folder: rank 0: [Errno 20]" in str(error)


def test_the_newest_whole_ones_are_kept(tmp_path):
    def steps():
        return [int(path.name[5:]) for path in sorted(tmp_path.glob("step_*"))]

    for step in (1, 2, 3):
        save_state(tmp_path, step, random_state(0), keep=0)
    assert steps() == [1, 2, 3]
    save_state(tmp_path, 4, random_state(0), keep=3)
    assert steps() == [2, 3, 4]
    (tmp_path / "step_00000004" / "index.json").write_text("{")
    save_state(tmp_path, 5, random_state(0), keep=2)
    assert steps() == [3, 4, 5], "a damaged one does not count as kept"
    save_state(tmp_path, 4, random_state(0), keep=1)
    assert steps() == [4, 5], "what a run that was rewound has not reached again is not its to remove"


def test_a_rank_may_hold_nothing(tmp_path):
    state = random_state(3)
    ranks = [pieces_of(state, layout(1, 1, 1, 0)[0]), []]
    empty = Piece("norm.weight", "weight", SHAPES["norm.weight"][0], None, 0, 0, 5, torch.zeros(0))
    ranks[1].append(empty)
    path = save_all(tmp_path, 1, ranks)[0]
    assert_whole(path, 3)
