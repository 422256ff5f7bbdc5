"""How this process was started: one rank of `deepspeed`, `torchrun` or `srun`, or a single plain process.

The only place of the package that reads the launcher's environment variables.
"""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_SLURM_PORT = 20000


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int | None = None
    launcher: str = "python"

    @property
    def is_first(self) -> bool:
        """True on the one rank that talks to the user."""
        return self.rank == 0


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's variables: RANK and friends (torchrun, deepspeed) or SLURM_PROCID and friends (srun).

    Raises:
        ValueError: a launcher's variable is missing or not a number.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE", "1")
        address = environ.get("MASTER_ADDR", "127.0.0.1")
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        launcher = "srun"
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        # "8(x2),4" means 8 tasks on the first two nodes; the largest is what the limits below are for.
        nodes = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")
        local_size = max((tasks.partition("(")[0] for tasks in nodes), key=lambda tasks: (len(tasks), tasks))
        address = environ.get("MASTER_ADDR") or _first_slurm_node(environ)
    else:
        return Launch()
    try:
        rank, world_size, local_rank = (int(environ.get(name, "0")) for name in names)
        job_port = (
            _SLURM_PORT + int(environ.get("SLURM_JOB_ID", "0")) % 10000
        )  # two jobs on a node do not meet
        port, local = int(environ.get("MASTER_PORT", job_port)), int(local_size)
    except ValueError as error:
        raise ValueError(f"the {launcher} launcher set a variable that is not a number: {error}") from error
    return Launch(rank, world_size, local_rank, local, address, port, launcher)


def _first_slurm_node(environ: Mapping[str, str]) -> str:
    """The host every rank can reach: the first of the job's nodes. No ssh is involved."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not any(mark in nodes for mark in "[,"):
        return nodes or "127.0.0.1"
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"cannot expand the node list {nodes!r}: set MASTER_ADDR to the first node"
        ) from error
    return names.stdout.split()[0]


def choose_device(setting: str, launch: Launch) -> torch.device:
    """The device this rank computes on: `auto` takes CUDA where there is a GPU for every local rank.

    Also tells DeepSpeed, which decides for itself when it is imported, and on a CPU divides the cores among the
    local ranks (unless OMP_NUM_THREADS says otherwise): more threads than cores wait for each other.

    Raises:
        ValueError: `cuda` was asked for and this machine has none, or fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # `srun --gpus-per-task=1` shows each task one GPU, its own.
    own = gpus == 1 and launch.launcher == "srun"
    if setting == "cuda" and gpus < launch.local_size and not own:
        raise ValueError(
            f"train.device is cuda, but {launch.local_size} ranks on this node have {gpus} GPUs: "
            f"start at most {gpus} ranks a node, or set train.device to cpu"
        )
    if setting != "cpu" and (gpus >= launch.local_size or own):
        number = 0 if own else launch.local_rank
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
    return torch.device("cpu")


def init_distributed(launch: Launch, device: torch.device, timeout_minutes: float) -> None:
    """Joins the process group: nccl on GPUs (gloo beside it for CPU tensors), gloo elsewhere.

    A single process uses an in-memory store, so it needs no port. Also leaves LOCAL_RANK and the rendezvous
    variables in the environment, where DeepSpeed looks them up.
    """
    os.environ.update(
        RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank)
    )
    os.environ.setdefault("MASTER_ADDR", launch.address)
    os.environ.setdefault("MASTER_PORT", str(launch.port or _free_port()))
    timeout = timedelta(minutes=timeout_minutes)
    # Every group made later, DeepSpeed's too, takes its limit from here; 30 minutes without it.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    init_method = f"tcp://{launch.address}:{launch.port}" if launch.launcher == "srun" else "env://"
    dist.init_process_group(
        backend, init_method=init_method, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
