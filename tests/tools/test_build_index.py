"""tools/build_index.py and tools/audit_data.py, and indices that were being built when the power went."""

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config import load_config
from megatron_lite.data import GPTDataset, IndexedDataset, IndexedDatasetWriter
from megatron_lite.data.build import build_run
from tools import audit_data, build_index, inspect_data


def write(prefix: Path, documents: int) -> str:
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in random.integers(1, 9, documents).tolist():
            writer.add_sequence(random.integers(0, 60, length).astype(np.uint16))
            writer.end_document()
    return str(prefix)


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    tree = {
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "seq_length": 8,
            "vocab_size": 64,
        },
        "data": {"train": write(tmp_path / "x", 400), "split": "8,1,1"},
        "train": {
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "steps": 30,
            "output_dir": str(tmp_path / "run"),
            "eval_interval": 10,
        },
        "optimizer": {"lr": 0.001},
    }
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return ["--config", str(tmp_path / "config.json")]


def test_training_finds_what_was_built(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert build_index.main(config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines[:3]] == ["train", "valid", "test"]
    assert all(f"into {tmp_path}/index_cache/" in line and " MB)" in line for line in lines[:3])
    assert lines[3:] == ["120 training samples, 40 validation samples, 40 test samples"]
    assert build_index.main(config) == 0
    assert capsys.readouterr().out.count("found in") == 3
    with caplog.at_level("DEBUG"):
        caplog.clear()
        build_run(load_config(config[1]))
    assert caplog.text.count("found in") == 3


def test_each_node_builds_its_own(config: list[str], tmp_path: Path) -> None:
    for node in ("a", "b"):
        assert build_index.main([*config, "--set", f"data.cache_dir={tmp_path}/{node}"]) == 0
    entries = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "ab"
    ]
    assert entries[0] == entries[1] and len(entries[0]) > 3 and not (tmp_path / "index_cache").exists()


def test_bad_input_is_one_message(
    config: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words in (
        ["--set", "data.train=absent"],
        ["--set", "data.spilt=1"],
        ["--resume", str(tmp_path / "run")],
    ):
        assert build_index.main([*config, *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert audit_data.main([str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_for_a_run_that_goes_on_with_another_length(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_config(config[1])
    data = build_run(loaded)
    progress = {"step": 10, "consumed_samples": 40, "data": data.state(40)}
    folder = tmp_path / "run" / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    metadata = {"config": loaded.model_dump(mode="json"), "progress": progress}
    (folder / "index.json").write_text(json.dumps({"content": {"step": 10, "metadata": metadata}}))
    longer = ["--set", "model.seq_length=16", "--resume", str(tmp_path / "run")]
    assert build_index.main([*config, *longer]) == 0
    shown = capsys.readouterr().out
    assert "goes on after the 40 samples it gave" in shown and "80 training samples" in shown
    assert audit_data.main([str(tmp_path / "run"), "--list", str(tmp_path / "list.tsv")]) == 0
    assert capsys.readouterr().out.startswith("step 10, 40 samples\n")
    for prefix, said in (
        (str(tmp_path / "x"), "share 1, 40 samples"),
        (str(tmp_path / "y"), "it is not in this run"),
    ):
        write(Path(prefix), 400)
        assert inspect_data.main([prefix, "--consumed", str(tmp_path / "run")]) == 0
        assert said in capsys.readouterr().out.partition("consumed at step 10:\n")[2]
    assert sum(int(row.split("\t")[3]) for row in (tmp_path / "list.tsv").read_text().splitlines()[1:]) == 320


def _build(prefix: str, cache: Path) -> GPTDataset:
    return GPTDataset(IndexedDataset(prefix), range(50_000), 80_000, 4, seed=1, cache_dir=cache)


def test_killed_at_any_moment_the_next_start_is_the_same(tmp_path: Path) -> None:
    """kill -9 at 20 random moments; what is there then serves, or is built again, with the same bytes."""
    prefix = write(tmp_path / "x", 50_000)
    begin = time.perf_counter()
    _build(prefix, tmp_path / "whole")
    takes = time.perf_counter() - begin
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.npy")}
    random = np.random.default_rng(0)
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        child = context.Process(target=_build, args=(prefix, tmp_path / "cache"))
        child.start()
        time.sleep(float(random.random()) * takes * 1.2)
        child.kill()
        child.join()
        _build(prefix, tmp_path / "cache")
        entries = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
        assert len(entries) == 1, "nothing temporary stays"
        assert {path.name: path.read_bytes() for path in entries[0].glob("*.npy")} == whole
        for path in entries[0].iterdir():
            path.unlink()
        entries[0].rmdir()
