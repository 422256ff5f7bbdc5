"""The command line of tools/dedup_corpus.py: options to rules, what is printed, exit status."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_lite.corpus.dedup import Decontaminate, Exact, Lines, MinHash, Substrings

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "dedup_corpus.py"))
main: Callable[[list[str]], int] = TOOL["main"]


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_options_become_rules_in_order() -> None:
    def rules(*options: str) -> list[object]:
        return TOOL["_rules"](TOOL["_parser"]().parse_args(["--input", "x", "--output", "y", *options]))

    assert rules() == []
    assert rules("--minhash", "--substrings", "99", "--lines", "--exact") == [
        *(Exact(), Lines(), Substrings(99), MinHash())
    ]
    assert rules("--exact", "normalized", "--lines", "paragraph", "--min-bytes", "7") == [
        *(Exact(True), Lines("paragraph", 7))
    ]
    options = ("--minhash", "--ngram", "3", "--bands", "20", "--rows", "5", "--verify", "0.7", "--seed", "9")
    assert rules(*options) == [MinHash(3, 20, 5, 0.7, 9)]
    options = ("--decontaminate", "a", "b", "--evaluation-key", "q", "--words", "10", "--cut-spans")
    assert rules(*options) == [Decontaminate(["a", "b"], "q", 10, cut="span")]
    assert rules("--decontaminate", "a", "--words", "5") == [Decontaminate(["a"], words=5, minimum=5)]


def test_counts_are_printed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.jsonl", "one", "two", "one")
    output = tmp_path / "out" / "y.jsonl"
    assert main(["--input", path, "--output", str(output), "--exact"]) == 0
    printed = capsys.readouterr().out
    assert "documents read 3 = kept 2 + dropped 1 + rejected 0" in printed
    assert "bytes of text 9 = kept 6 + dropped 3 + cut 0; " in printed and "MB/s" in printed
    report = json.loads((tmp_path / "out" / "y.jsonl.report.json").read_text())
    assert report["documents"] == {"read": 3, "kept": 2, "dropped": 1, "rejected": 0}
    assert report["rules"][0]["examples"][0]["kept"] == f"{path}:1"


def test_interrupts_leave_nothing_and_nobody(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl", *(f"document {number} has words of its own" for number in range(100_000))
    )
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        str(root / "tools" / "dedup_corpus.py"),
        "--input",
        path,
        "--output",
        "o.jsonl",
    ]
    with subprocess.Popen(
        [*command, "--minhash", "--workers", "2"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            while not list(tmp_path.glob(".o.jsonl.dedup/run-*/verdict.bin")):
                assert process.poll() is None
                time.sleep(0.01)
            for _ in range(2):
                os.killpg(process.pid, signal.SIGINT)
            said, _ = process.communicate(timeout=60)  # the workers hold the pipe open
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (said, process.returncode) == (b"interrupted: nothing is written\n", 130)
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n{"text": 2}\n')
    arguments = ["--input", str(path), "--output", str(tmp_path / "y.jsonl"), "--exact"]
    assert main(arguments) == 2
    assert (
        f'error: {path}:2: "text" is a int' in capsys.readouterr().err and not (tmp_path / "y.jsonl").exists()
    )
    assert main([*arguments, "--on-error", "skip"]) == 3
    assert "kept 1 + dropped 0 + rejected 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(arguments[:-1])
    assert ended.value.code == 2 and "at least one rule" in capsys.readouterr().err
