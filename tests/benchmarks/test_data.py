"""benchmarks/data.py runs to the end and fills its tables; nothing is said of how fast."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, status: int = 0) -> str:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/data.py"),
        *arguments,
        "--rounds",
        "1",
        "--workers",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def sides(output: str, section: str) -> list[str]:
    """The first cells of the section's table."""
    lines = output[output.index(f"\n{section}, ") :].split("\n\n")[1].splitlines()
    return [line.split("|")[1].strip() for line in lines[2:]]


def test_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text of the corpus\n" * 500)
    (tmp_path / "y.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 500)
    texts = [f"{tmp_path}/x.txt", f"{tmp_path}/y.jsonl"]
    output = run("encode", "--megabytes", "1", "--tokenizer", "byte", "--text", *texts)
    assert sides(output, "encode") == ["megatron_lite", "megatron_lite, --encoder reference"]
    assert "- of 1 MB of text only 0 are here" in output and "machine: " in output


def test_unknown_sections_are_named() -> None:
    assert "no section encoding; there are encode, loader, index, dedup" in run("encoding", status=2)


@pytest.mark.slow
def test_every_side_that_is_installed() -> None:
    small = {"megabytes": "0.5", "seconds": "0.1", "loader-tokens": "1e5", "index-tokens": "1e6"}
    options = [part for name, value in small.items() for part in (f"--{name}", value)]
    output = run("encode", "loader", "index", *options)
    peers = ["megatron-core"] if importlib.util.find_spec("megatron") else []
    assert sides(output, "loader") == ["megatron_lite", *peers, "nanoGPT get_batch"]
    assert sides(output, "index") == ["megatron_lite", *peers]
    assert [name.split()[0] for name in sides(output, "encode")][2:] == ["tokenizers", "gigatoken"]
