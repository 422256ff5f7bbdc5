"""Ctrl-C ends a run and its workers at once, whatever they are doing, and however often it comes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_lite.corpus.workers import one_interrupt, worker_processes

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import pathlib, sys, time
from megatron_lite.corpus.workers import one_interrupt, worker_processes

def work(kind):
    if kind == "sleep":
        time.sleep(600)
    return bytes(64 << 20)  # takes a while to hand over

if __name__ == "__main__":
    try:
        with one_interrupt(), worker_processes(2) as pool:
            if sys.argv[1] != "start":
                pool.submit(work, "").result()
            results = [pool.submit(work, sys.argv[1]) for _ in range(200)]
            print("begin", flush=True)
            for number, result in enumerate(results):
                result.result()
                results[number] = None
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
"""


@pytest.mark.parametrize("kind", ["start", "sleep", "results"])
def test_interrupts_end_all_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), kind]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begin\n"
        time.sleep(0.05)
        try:
            for _ in range(2):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.01)
            # The pipe ends when the workers have ended, too: they hold it open.
            said, _ = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (said, process.returncode) == (b"interrupted\n", 130)


def test_a_worker_that_is_killed_is_one_error() -> None:
    with pytest.raises(ChildProcessError, match="try less"), worker_processes(1, remedy="less") as pool:
        pool.submit(os._exit, 1).result()


def test_what_ignores_interrupts_goes_on_doing_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with one_interrupt():
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
        with one_interrupt():
            pass
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt), one_interrupt():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # while the command ends
    finally:
        signal.signal(signal.SIGINT, before)
