"""The output folder is one run's at a time, and is let go of however the run ends."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config import Config
from megatron_lite.training.output import LOCK, Output
from tests.command_line import run_command, words, write_bytes
from tests.test_pretrain_gpt import at_step
from tests.training_case import Case


def config(folder: Path, **settings: Any) -> Config:
    return Case(
        settings={"train.output_dir": str(folder)} | {k.replace("__", "."): v for k, v in settings.items()}
    ).config()


def in_a_child(action: Callable[[], Any]) -> int:
    """A forked process that calls `action`, then sleeps until it is killed; returns when it has called."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = action()  # noqa: F841 (what it holds, it holds on to)
            os.write(write, b"1")
            signal.alarm(60)  # whatever becomes of the test
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read(1) == b"1"
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_run_is_refused_and_kill_9_lets_go_at_once(tmp_path: Path) -> None:
    holder = in_a_child(lambda: Output(config(tmp_path), active=True))
    with pytest.raises(ValueError) as error:
        Output(config(tmp_path), active=True)
    assert str(error.value) == (
        f"train.output_dir: another run writes in {tmp_path} (process {holder} on {socket.gethostname()}); wait for "
        "its end, stop it, or set another folder"
    )
    Output(config(tmp_path), active=False).close()
    assert str(holder) in (tmp_path / LOCK).read_text(), "the one that was refused changes nothing"
    kill(holder)
    Output(config(tmp_path), active=True).close()
    holder = in_a_child(lambda: Output(config(tmp_path), active=True).close())
    Output(config(tmp_path), active=True).close()
    kill(holder)


def test_children_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    def hold() -> tuple[Output, list[int]]:
        output = Output(config(tmp_path), active=True)
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        children = [in_a_child(lambda: None), subprocess.Popen(sleep, close_fds=False).pid]
        (tmp_path / "children").write_text(" ".join(map(str, children)))
        return output, children

    kill(in_a_child(hold))
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    try:
        for pid in children:
            os.kill(pid, 0)  # it lives
        Output(config(tmp_path), active=True).close()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.INFO):
        Output(config(tmp_path), active=True).close()
    assert caplog.messages == [
        f"{tmp_path}: this file system has no locks (No locks available), so a second run in the same folder would "
        "not be noticed"
    ]


@pytest.mark.parametrize("name", ["checkpoints", "weights"])
@pytest.mark.parametrize("spoil", ["unwritable", "file", "broken"])
def test_folders_that_saves_go_to_are_tried_at_start(name: str, spoil: str, tmp_path: Path) -> None:
    """/proc takes no files, not even root's."""
    if spoil == "file":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).symlink_to("/proc" if spoil == "unwritable" else tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"^train.output_dir: cannot write in {tmp_path}/{name}: "):
        Output(config(tmp_path, checkpoint__weights_interval=5), active=True)
    if name == "weights":
        Output(config(tmp_path), active=True).close()


def test_a_run_holds_its_folder_to_the_end(tmp_path: Path) -> None:
    prefix = write_bytes(tmp_path)
    arguments = words(prefix, tmp_path / "run", "train.steps=2")

    def try_it() -> None:
        pid = os.fork()
        if pid == 0:
            try:
                Output(config(tmp_path / "run"), active=True)
            except ValueError:
                os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3

    (result,) = run_command(arguments, first=lambda: at_step(2, try_it))
    assert (result.status, result.err) == (0, "")
    mine = Output(config(tmp_path / "run"), active=True)
    results = run_command(arguments, ranks=2)
    mine.close()
    assert [result.status for result in results] == [2, 2]
    assert f"train.output_dir: another run writes in {tmp_path}/run (process " in results[0].err
    assert results[1].err == ""
    assert [result.status for result in run_command(arguments, ranks=2)] == [0, 0]
