"""The main job under real launchers: one start of each, since a start takes many seconds."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import ROOT, repeatable, rows, words, write_bytes

SCRIPT = str(ROOT / "pretrain_gpt.py")
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "PORT"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "PORT"],
}
ENDLESS = "train.steps=1000000"
# For optional features, for other jobs, or for compiling: none of them for a start of training.
NEEDLESS = (
    "transformers",
    "tensorboard",
    "wandb",
    "sentencepiece",
    "tiktoken",
    "tokenizers",
    "torch._inductor.compile_fx",
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bytes(tmp_path_factory.mktemp("data"))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """This one without what another launcher left in it."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in left} | more


@contextlib.contextmanager
def started(command: list[str], cwd: Path, **environ: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of which nothing is left at the end, nor of what it started."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(TEST_RUN=str(cwd), **environ),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        for pid in members(cwd):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def members(cwd: Path, variable: str = "") -> list[int]:
    """The processes that `started` in this folder, and of them those that have also `variable`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            held = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"TEST_RUN={cwd}" in held and (variable in held or not variable):
                found.append(int(entry.name))
    return found


def wait_for_rows(process: "subprocess.Popen[str]", output: Path, count: int) -> None:
    """Until the run has done `count` steps."""
    for _ in range(3000):
        assert process.poll() is None, process.communicate()
        if (output / "metrics.jsonl").exists() and len(rows(output)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("no step was done")


def test_plain_python_from_another_folder(prefix: str, tmp_path: Path) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    command = [
        sys.executable,
        "-X",
        "importtime",
        SCRIPT,
        *words(prefix, "runs/relative", "train.steps=3", "train.device=auto"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True)
    imported = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert done.returncode == 0
    assert re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE) == ""
    assert (
        "python on cuda: " in done.stdout or "python on cpu (no GPU for each rank: " in done.stdout
    ) and "done at step 3" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "runs/relative")] == [1, 2, 3]
    assert [name for name in imported if name in NEEDLESS] == []
    assert "torch" in imported and "deepspeed" in imported
    left = set(os.listdir("/dev/shm")) - shared_memory
    # Python's own names (process pools) are those of tests beside this one: the main job makes none.
    assert [name for name in left if not name.startswith("sem.mp-")] == []


def test_bad_settings_end_before_torch_distributed_is_touched(prefix: str, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, *words(prefix, "run", "train.stpes=3")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True)
    assert done.returncode == 2
    assert (
        done.stdout == "" and done.stderr.startswith("error: ") and "did you mean train.steps?" in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_control_c_ends_without_a_traceback(prefix: str, tmp_path: Path) -> None:
    with started([sys.executable, SCRIPT, *words(prefix, "run", ENDLESS)], tmp_path) as process:
        wait_for_rows(process, tmp_path / "run", 2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""


def test_srun(prefix: str, tmp_path: Path) -> None:
    """Two tasks with SLURM's variables and nothing else."""
    arguments = [sys.executable, SCRIPT, *words(prefix, "run", "train.steps=3", "parallel.tensor=2")]
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    with contextlib.ExitStack() as stack:
        tasks = [
            stack.enter_context(
                started(arguments, tmp_path, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **slurm)
            )
            for rank in (0, 1)
        ]
        texts = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert "2 ranks under srun" in texts[0][0]
    assert (texts[0][1], *texts[1]) == ("", "", "")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_takes_the_others_down_and_the_run_goes_on_elsewhere(
    launcher: str, prefix: str, tmp_path: Path
) -> None:
    layout = ("parallel.pipeline=2", "checkpoint.interval=3", "checkpoint.keep=0")
    command = [word.replace("PORT", free_port()) for word in LAUNCHERS[launcher]]
    with started([*command, SCRIPT, *words(prefix, "run", ENDLESS, *layout)], tmp_path) as process:
        wait_for_rows(process, tmp_path / "run", 4)
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():  # written beside training
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        (rank,) = members(tmp_path, "RANK=1")
        os.kill(rank, signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"2 ranks under {launcher}" in out
    assert not members(tmp_path)
    # One process goes on from what the two had saved.
    before = repeatable(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, SCRIPT, *words(prefix, "run", ENDLESS, "train.exit_after_steps=1", "checkpoint.keep=0")],
        cwd=tmp_path, env=environment(), text=True, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    after = repeatable(tmp_path / "run")
    assert after[:3] == before[:3]
    assert re.search(r"starting from \S+/step_\d+ at step \d*[1-9]", done.stdout)
