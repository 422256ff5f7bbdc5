"""python -m megatron_lite.config."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.config.__main__ import main


def test_prints_the_resolved_tree(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(small), "--set", "model.vocab_size=257", "--set", "parallel.pipeline=4", "--world", "16"])
        == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out)["model"]["ffn_hidden_size"] == 256
    assert (
        "228,736 parameters" in err and "data-parallel size 4, 2 micro-batches" in err and "warning: " in err
    )


def test_says_what_is_wrong_and_returns_2(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small), "--set", "parallel.tensr=2", "--files"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "did you mean parallel.tensor?" in err and "data.train: is required" in err


def test_runs_as_a_module_without_torch_or_deepspeed(small: Path) -> None:
    code = (
        "import sys; from megatron_lite.config.__main__ import main; "
        f"assert main([{str(small)!r}, '--world', '3']) == 2; "
        "assert not {'torch', 'deepspeed', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lite.config", "--schema"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)["title"] == "megatron_lite configuration"
