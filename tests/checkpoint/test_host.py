"""The copy in host memory: the same bits, apart from what they were taken from, in memory that is kept; room for it."""

import contextlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import megatron_lite.checkpoint.host as host_module
from megatron_lite.checkpoint import Deferred, HostCopy, Piece, available_bytes
from tests.distributed import run_ranks


def some_pieces(scale):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) * scale for size in (1, 7, 64, 1000)]
    tensors += [tensors[3].bfloat16(), torch.arange(5), tensors[3].clone().view(10, 100)[:, 3]]
    return [Piece(f"p{at}", "weight", (len(t),), None, 0, 0, at, t) for at, t in enumerate(tensors)]


def copied(host, pieces):
    """As a save does it: the memory here, the copying in another thread."""
    copies, copy = host.begin(pieces)
    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    return copies


def test_a_copy_is_the_same_and_stays_so():
    host, pieces = HostCopy(), some_pieces(1)
    for _ in range(2):
        copies = copied(host, pieces)
        where = [copy.data.data_ptr() for copy in copies]
        for piece, copy in zip(pieces, copies, strict=True):
            assert (copy.name, copy.flat_start) == (piece.name, piece.flat_start)
            assert copy.data.dtype == piece.data.dtype and torch.equal(copy.data, piece.data)
            expected = piece.data.clone()
            piece.data.add_(1)
            assert torch.equal(copy.data, expected)
    again = copied(host, some_pieces(2)[:4])
    assert [copy.data.data_ptr() for copy in again] == where[:4], "memory is kept"
    *_, large = copied(host, [*pieces, Piece.whole("large", "weight", torch.ones(100_000))])
    assert large.data.sum() == 100_000


def threads_of_a_copy():
    """How many threads this process has, before the copying and at its end, where torch may use four."""
    torch.set_num_threads(4)
    _, copy = HostCopy().begin([Piece.whole("p", "weight", torch.ones(1_000_000))])
    found = [len(os.listdir("/proc/self/task"))]
    thread = threading.Thread(target=lambda: (copy(), found.append(len(os.listdir("/proc/self/task")))))
    thread.start()
    thread.join()
    return found


def test_copying_is_of_one_thread():
    """Another OpenMP team would compete with training's for the cores."""
    ((before, beside),) = run_ranks(1, threads_of_a_copy)
    assert beside == before + 1


def test_memory_that_is_refused_is_refused_before_the_copying(monkeypatch):
    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        HostCopy().begin(some_pieces(1))


def test_pieces_of_odd_sizes_are_aligned():
    sizes = [(torch.uint8, 3), (torch.float32, 5), (torch.bfloat16, 1), (torch.int64, 2), (torch.uint8, 65)]
    tensors = [torch.arange(size, dtype=dtype) for dtype, size in [*sizes, (torch.float32, 1)]]
    pieces = [Piece.whole(f"p{at}", "weight", tensor) for at, tensor in enumerate(tensors)]
    for piece, copy in zip(pieces, copied(HostCopy(), pieces), strict=True):
        assert torch.equal(copy.data, piece.data) and copy.data.data_ptr() % 64 == 0


def test_memory_stays_the_same_after_a_fork():
    """What the child writes would not be seen in a private page, and neither would what a GPU writes."""
    (copy,) = copied(HostCopy(), [Piece.whole("p", "weight", torch.zeros(3))])
    if (child := os.fork()) == 0:
        try:
            copy.data.fill_(1)
        finally:
            os._exit(0)  # whatever happens, a child must not run the rest of the tests
    os.waitpid(child, 0)
    assert copy.data.tolist() == [1, 1, 1]


def test_page_locks_that_are_refused_are_asked_for_once(monkeypatch):
    asked, host = [], HostCopy()

    def refuse(pointer, size, flags):
        asked.append(size)
        return 1

    def blamed(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuse))
    monkeypatch.setattr(torch, "zeros", blamed)
    for size in (100, 100, 50, 200, 200):
        host._reserve(size)
        host._lock()
    assert asked == [100, 200], "again only for other memory"
    host.close()


class OnGpu(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda:1"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpus_part_is_queued_after_the_callers_on_a_stream_of_its_own(monkeypatch, fails):
    """Told by stand-ins, where there is no GPU: what is asked of it, in which order and in which thread."""
    said = []

    def note(*what):
        said.append((threading.current_thread().name, *what))
        return "event"

    @contextlib.contextmanager
    def context(what, value):
        note("begin", what, str(value))
        yield
        note("end", what)

    class Stream:
        record_event = staticmethod(lambda: note("record"))
        wait_event = staticmethod(lambda event: note("wait for", event))
        synchronize = staticmethod(lambda: note("synchronize"))
        __str__ = staticmethod(lambda: "new")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda gpu: note("stream of", str(gpu)) and Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: context("device", gpu))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: context("stream", stream))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(HostCopy, "_lock", lambda self: note("lock"))

    def on_stream(to, tensor):
        note("copy")
        if fails:
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(host_module, "_copy", on_stream)
    _, copy = HostCopy().begin([Piece.whole("p", "weight", torch.ones(3).as_subclass(OnGpu))])
    assert [words[1:] for words in said] == [("stream of", "cuda:1"), ("record",)]
    said.clear()
    with ThreadPoolExecutor(1, "saver") as thread:
        assert bool(thread.submit(copy).exception()) == fails
    assert {name for name, *_ in said} == {"saver_0"}
    expected = [("begin", "device", "cuda:1"), ("lock",), ("wait for", "event"), ("begin", "stream", "new")]
    expected += [("copy",), ("synchronize",)]
    assert [words[1:] for words in said][:6] == expected


def test_a_deferred_tensor_has_no_copy():
    deferred = Deferred(torch.float32, (3,), lambda: torch.ones(3))
    with pytest.raises(AssertionError, match="made in its turn"):
        HostCopy().begin([Piece("p", "weight", (3,), None, 0, 0, 0, deferred)])


@pytest.mark.gpu
def test_from_a_gpu():
    """What the caller's stream has still to do is in the copy; pieces that are not on the GPU are copied, too."""
    host, last = HostCopy(), torch.cuda.device_count() - 1
    with torch.cuda.device(last):  # not a new thread's, where there are two
        for scale in (1, 2):
            pieces = [replace(piece, data=piece.data.cuda()) for piece in some_pieces(scale)]
            pieces.append(Piece.whole("on the host", "exp_avg", torch.zeros(3)))
            expected = [(piece.data + 1).cpu() for piece in pieces]
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(200_000_000)
                for piece in pieces:
                    piece.data.add_(1)
                copies = copied(host, pieces)
            for data, copy in zip(expected, copies, strict=True):
                assert copy.data.device.type == "cpu" and torch.equal(copy.data, data)
        assert host._locked
        host.close()


GIB = 1 << 30
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def group_v2(limit, current=0, inactive_file=0):
    stat = f"anon 7\nfile {8 * GIB}\ninactive_file {inactive_file}\nactive_file {8 * GIB}\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{current}\n", "memory.stat": stat}


def group_v1(limit, usage=0, inactive_file=0):
    stat = f"cache 7\ninactive_file {9 * GIB}\ntotal_inactive_file {inactive_file}\n"
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": stat,
    }


POD = "/kubepods.slice/pod1/main"
JOB = "5:cpu,cpuacct:/slurm\n4:memory:/slurm/job_1/step_0\n1:name=systemd:/init\n0::/init\n"
UNLIMITED_V1 = (1 << 63) - 4096


@pytest.mark.parametrize(
    ("groups", "tree", "left"),
    [
        (None, {}, 100 * GIB),
        ("0::/\n", {}, 100 * GIB),
        ("0::/\n", {V2: group_v2(64 * GIB, 10 * GIB)}, 54 * GIB),
        ("0::/\n", {V2: group_v2(64 * GIB, 10 * GIB, 4 * GIB)}, 58 * GIB),
        ("0::/\n", {V2: group_v2("max", 10 * GIB)}, 100 * GIB),
        ("0::/\n", {V2: group_v2(200 * GIB, 10 * GIB)}, 100 * GIB),
        ("0::/\n", {V2: group_v2(GIB, 2 * GIB)}, 0),
        # The limit is one of a group above the process's own, or the container sees no other than its own.
        (f"0::{POD}\n", {V2 + POD: group_v2("max"), V2 + "/kubepods.slice/pod1": group_v2(6 * GIB)}, 6 * GIB),
        (
            f"0::{POD}\n",
            {V2 + POD: group_v2(9 * GIB), V2 + "/kubepods.slice": group_v2(6 * GIB, GIB)},
            5 * GIB,
        ),
        (f"0::{POD}\n", {V2: group_v2(3 * GIB)}, 3 * GIB),
        ("0::/../other\n", {V2: group_v2(3 * GIB)}, 3 * GIB),
        (JOB, {V1 + "/slurm/job_1": group_v1(8 * GIB, 3 * GIB, GIB), V2: group_v2(GIB)}, GIB),
        (JOB, {V1 + "/slurm/job_1": group_v1(8 * GIB, 3 * GIB, GIB)}, 6 * GIB),
        (JOB, {V1 + "/slurm/job_1/step_0": group_v1(UNLIMITED_V1), V1: group_v1(UNLIMITED_V1)}, 100 * GIB),
        (JOB, {V1: group_v1(8 * GIB)}, 8 * GIB),
        (JOB, {V1 + "/slurm": {"memory.limit_in_bytes": "1"}}, 100 * GIB),
    ],
)
def test_what_control_groups_leave(tmp_path, groups, tree, left):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 << 20} kB\nBuffers: 1 kB\n")
    if groups is not None:
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for folder, files in tree.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    assert available_bytes(tmp_path) == left


def test_a_system_that_does_not_tell(tmp_path):
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    for text in ("", "MemAvailable:", "MemAvailable: many kB"):
        (tmp_path / "proc/meminfo").write_text(text)
        assert available_bytes(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")
def test_this_system_tells():
    available = available_bytes()
    assert available is not None and 0 < available < 1 << 50
