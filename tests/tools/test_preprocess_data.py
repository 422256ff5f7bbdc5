"""The command lines, as a user runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import IndexedDataset

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_preprocess_then_inspect(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "hello"}\n{"text": ""}\n{"text": "world, world"}\n')
    done = run(
        *("preprocess_data.py", "--input", "x.jsonl", "--output-prefix", "x", "--tokenizer", "byte"),
        *("--append-eod", "--workers", 2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "documents read 3 = written 2 + empty 1 + rejected 0; 19 tokens" in done.stdout
    assert "MB/s" in done.stdout
    assert IndexedDataset(tmp_path / "x_text_document")[0].tolist() == [*b"hello", 256]

    done = run("inspect_data.py", "x_text_document", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "documents 3, sequences 2, tokens 19" in done.stdout and "uint16" in done.stdout
    assert "verified" in done.stdout and not (tmp_path / "index_cache").exists()


@pytest.mark.parametrize("order", ["epoch", "megatron"])
def test_inspect_dumps_the_training_samples(tmp_path: Path, order: str) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(40)))
    run(
        "preprocess_data.py",
        *["--input", "x.jsonl", "--output-prefix", "x", "--tokenizer", "byte"],
        cwd=tmp_path,
    )
    arguments = f"x_text_document --seq-length 8 --split 8,2 --seed 7 --num-samples 90 --order {order}"
    done = run("inspect_data.py", *arguments.split(), "--dump", "out.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = np.load(tmp_path / "out.npz")["tokens"]
    assert tokens.shape == (90, 9) and tokens.dtype == np.int64

    from megatron_lite.config import DataConfig
    from megatron_lite.data import build_datasets

    config = DataConfig(train=str(tmp_path / "x_text_document"), split="8,2", order=order)  # type: ignore[arg-type]
    train, _, _ = build_datasets(config, 8, 7, 90)
    np.testing.assert_array_equal(tokens, train.batch(range(90)))


def test_bad_input_is_one_message_exit_2_and_no_output(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": "cut\n')
    arguments = ["--input", "x.jsonl", "--output-prefix", "x", "--tokenizer", "byte"]
    done = run("preprocess_data.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "x.jsonl:2: not JSON" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    done = run("preprocess_data.py", *arguments, "--on-error", "skip", cwd=tmp_path)
    assert done.returncode == 3 and "rejected 1" in done.stdout and "x.jsonl:2: not JSON" in done.stderr
    for bad in (["--tokenizer", "bite"], ["--input", "absent"], ["--workers", "0"]):
        done = run("preprocess_data.py", *arguments, *bad, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, bad


def test_damaged_data_is_one_message_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text " * 100)
    run(
        "preprocess_data.py",
        *["--input", "x.txt", "--output-prefix", "x", "--tokenizer", "byte"],
        cwd=tmp_path,
    )
    path = tmp_path / "x_text_document.bin"
    path.write_bytes(path.read_bytes()[:-3])
    done = run("inspect_data.py", "x_text_document", cwd=tmp_path)
    assert done.returncode == 2 and "997 bytes" in done.stderr and "Traceback" not in done.stderr
    for bad in (["--num-samples", "3"], ["--dump", "x.npz"], ["--seq-length", "0"]):
        assert run("inspect_data.py", "x_text_document", *bad, cwd=tmp_path).returncode == 2, bad
    done = run("inspect_data.py", "absent", cwd=tmp_path)
    assert done.returncode == 2 and "absent.idx: no such file" in done.stderr


@pytest.mark.parametrize("tool", ["preprocess_data", "inspect_data"])
def test_the_tools_start_without_torch(tool: str) -> None:
    code = f"import sys; sys.path.insert(0, 'tools'); import {tool}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
