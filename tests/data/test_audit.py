"""What a run has consumed, against the inputs that its loaders gave."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config import Config
from megatron_lite.data import DatasetError
from megatron_lite.data.audit import audit, describe, read_checkpoint, write_list

from .conftest import MakePrefix
from .test_position import APART, Simulation, lengths_of


def save(folder: Path, run: Simulation, config: Config) -> None:
    folder.mkdir(parents=True)
    progress = {"step": run.step, "consumed_samples": run.consumed, "data": run.saved}
    metadata = {"config": config.model_dump(mode="json"), "progress": progress}
    (folder / "index.json").write_text(json.dumps({"content": {"step": run.step, "metadata": metadata}}))


@pytest.mark.parametrize("order", ["epoch", "megatron"])
@pytest.mark.parametrize("number", range(8))
def test_every_document(make_prefix: MakePrefix, tmp_path: Path, order: str, number: int) -> None:
    random = np.random.default_rng(number)
    lengths = [lengths_of(random) for _ in range(2)]
    prefixes = [
        make_prefix(own, f"d{k}", np.arange(sum(own), dtype=np.int32) + k * APART)
        for k, own in enumerate(lengths)
    ]
    run = Simulation(tmp_path)
    train: object = [[0.4, prefixes[0]], [0.6, prefixes[1]]]
    phases = [(train, 8, "concat")]
    if order == "epoch":
        phases += [(prefixes[1], 5, "best_fit"), (train, 16, "concat")]
    elif number % 2:
        phases = [(prefixes[0], 8, "concat")]
    for train, seq_length, packing in phases:
        config = run.config(100, 2, seq_length, number, train=train, packing=packing, order=order)
        run.job(config, int(random.integers(1, 20)))
    save(tmp_path / "run" / "checkpoints" / "step_00000100", run, config)
    step, sources = audit(tmp_path / "run")
    counts = Counter(token for found in run.inputs for token in found)
    assert step == run.step
    for source in sources:
        k = prefixes.index(source.prefix)
        ends = np.cumsum(lengths[k]) + k * APART
        expected = [
            sum(counts[token] for token in range(end - length, end))
            for end, length in zip(ends.tolist(), lengths[k], strict=True)
        ]
        assert source.inputs.tolist() == expected
        wholly, partly, untouched = source.documents()
        assert wholly + partly + untouched == np.count_nonzero(lengths[k])
        assert source.epochs == sum(expected) / sum(lengths[k])
    assert sum(source.samples for source in sources) == run.consumed


def test_what_is_said_and_listed(make_prefix: MakePrefix, tmp_path: Path) -> None:
    prefix = make_prefix([8, 0, 8, 8, 8])
    run = Simulation(tmp_path)
    config = run.config(9, 1, 4, train=prefix)
    run.job(config, 3)
    save(tmp_path / "x", run, config)
    _, sources = audit(tmp_path / "x")
    wholly, partly, untouched = sources[0].documents()
    assert describe(sources[0]) == (
        f"{prefix}: share 1, 3 samples, 12 tokens, 0.375 epochs; of epoch 1: {wholly} documents wholly, "
        f"{partly} partly, {untouched} not yet"
    )
    assert 2 * wholly + partly == 3 and wholly + partly + untouched == 4
    write_list(tmp_path / "list.tsv", sources)
    title, *rows = [line.split("\t") for line in (tmp_path / "list.tsv").read_text().splitlines()]
    assert title == ["prefix", "sequence", "tokens", "inputs"]
    assert len(rows) == wholly + partly and sum(int(row[3]) for row in rows) == 12


def test_a_run_that_went_back_is_read_where_it_resumes(make_prefix: MakePrefix, tmp_path: Path) -> None:
    run = Simulation(tmp_path)
    config = run.config(9, 1, 4, train=make_prefix([8, 8, 8]))
    for step in (1, 2, 3):
        run.job(config, 1)
        save(tmp_path / "checkpoints" / f"step_{step:08d}", run, config)
    assert read_checkpoint(tmp_path)[0] == 3
    for text, step in (
        ("step_00000002 crc32:00000000\n", 2),
        ("step_00000001\n", 1),
        ("step_00000009\n", 3),
        ("", 3),
    ):
        (tmp_path / "checkpoints" / "latest").write_text(text)
        assert read_checkpoint(tmp_path)[0] == read_checkpoint(tmp_path / "checkpoints")[0] == step


def test_bad_checkpoints(make_prefix: MakePrefix, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no checkpoint"):
        audit(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DatasetError, match="not a checkpoint of a run"):
        read_checkpoint(tmp_path)
    run = Simulation(tmp_path)
    prefix = make_prefix([8, 8])
    config = run.config(9, 1, 4, train=prefix)
    run.job(config, 2)
    save(tmp_path / "new", run, config)
    make_prefix([8, 8], tokens=np.ones(16, np.int32))
    with pytest.raises(DatasetError, match="not the data that the run has read"):
        audit(tmp_path / "new")
    run.saved = None
    save(tmp_path / "old", run, config)
    with pytest.raises(DatasetError, match="before checkpoints said"):
        audit(tmp_path / "old")
