"""What each launcher tells a process, and what is made of it."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lite.parallel import launch
from megatron_lite.parallel.launch import Launch, choose_device, detect_launch, init_distributed

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu7",
    "SLURM_JOB_NODELIST": "gpu[7-9]",
}


def test_plain_python() -> None:
    found = detect_launch({"PATH": "/bin", "SLURM_JOB_ID": "1"})
    assert found == Launch() and found.is_first and found.world_size == 1


def launched(**fields: Any) -> Launch:
    return Launch(**{"rank": 5, "world_size": 8, "local_rank": 1, "address": "node0", "port": 1234} | fields)


def test_torchrun_and_deepspeed() -> None:
    assert detect_launch(TORCHRUN) == launched(local_size=4, launcher="torchrun")
    found = detect_launch(DEEPSPEED)
    assert found == launched(local_size=2, launcher="deepspeed") and not found.is_first


def test_torchrun_within_a_slurm_job() -> None:
    assert detect_launch(SLURM | TORCHRUN).launcher == "torchrun"


def test_srun() -> None:
    assert detect_launch(SLURM) == launched(local_size=1, address="gpu7", port=20000, launcher="srun")
    assert detect_launch(SLURM | {"SLURM_JOB_ID": "90123"}).port == 20123
    assert detect_launch(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "77"}).address == "head"
    assert detect_launch(SLURM | {"MASTER_PORT": "77"}).port == 77


@pytest.mark.parametrize(("tasks", "largest"), [("8", 8), ("8(x2),4", 8), ("2,4(x3)", 4), ("4(x2)", 4)])
def test_srun_tasks_a_node(tasks: str, largest: int) -> None:
    assert detect_launch(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks}).local_size == largest


def test_srun_node_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[7-9]" ] && printf "gpu7\\ngpu8\\ngpu9\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert detect_launch(SLURM | {"SLURM_STEP_NODELIST": "gpu[7-9]"}).address == "gpu7"


def test_srun_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(ValueError, match=r"gpu\[7-9\].*set MASTER_ADDR"):
        detect_launch(SLURM | {"SLURM_STEP_NODELIST": "gpu[7-9]"})


@pytest.mark.parametrize(
    ("environ", "name"), [(TORCHRUN, "RANK"), (SLURM, "SLURM_PROCID"), (DEEPSPEED, "MASTER_PORT")]
)
def test_not_a_number(environ: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=r"not a number.*'x'"):
        detect_launch(environ | {name: "x"})


def test_device_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that it is put back as it was
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", Launch()) == choose_device("cpu", Launch()) == torch.device("cpu")
    with pytest.raises(ValueError, match="1 ranks on this node have 0 GPUs"):
        choose_device("cuda", Launch())


def test_device_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto", Launch(local_rank=1)) == torch.device("cuda", 1)
    assert chosen == [1]
    assert choose_device("cpu", Launch(local_rank=1)) == torch.device("cpu")
    with pytest.raises(ValueError, match="start at most 2 ranks a node"):
        choose_device("cuda", Launch(local_rank=0, local_size=3))


def test_fewer_gpus_than_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All local ranks go to the CPU, not only those without a GPU: they could not talk to each other."""
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", Launch(local_rank=0, local_size=4)) == torch.device("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_cores_are_divided_among_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    choose_device("cpu", Launch(local_size=5))
    assert threads == [], "OMP_NUM_THREADS decides where it is set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_device("cpu", Launch(local_size=5))
    choose_device("cpu", Launch(local_size=16))
    assert threads == [2, 1]


def test_one_process_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are put back as they were
        monkeypatch.delenv(name)
    try:
        init_distributed(Launch(), torch.device("cpu"), 1)
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "0"
        init_distributed(Launch(), torch.device("cpu"), 1)  # joined already
    finally:
        dist.destroy_process_group()


def _join(rank: int, port: int, launcher: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_distributed(Launch(rank, 2, rank, port=port, launcher=launcher), torch.device("cpu"), 1)
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    os._exit(0 if total == 3 and os.environ["MASTER_PORT"] == str(port) else 1)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_two_processes_meet(launcher: str) -> None:
    port, children = launch._free_port(), []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            try:
                _join(rank, port, launcher)
            finally:
                os._exit(2)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
