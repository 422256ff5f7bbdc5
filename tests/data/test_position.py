"""A run whose mixture, sequence length, packing, seed and number of ranks change: on the level of tokens."""

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config import Config, build_config
from megatron_lite.data import DataLoader, DatasetError, GPTDataset, IndexedDataset, make_loader
from megatron_lite.data.build import RunData, build_run
from megatron_lite.data.rest import Taken, merged, start_after
from megatron_lite.data.sample_index import Tokens

from .conftest import MakePrefix

EOD = 10**6  # in no data: documents are told by their ids here, which are all different
APART = 10_000  # the ids of source k begin at k * APART


def lengths_of(random: np.random.Generator) -> list[int]:
    lengths = random.integers(0, random.integers(2, 50), random.integers(2, 30)).tolist()
    return [*lengths, int(random.integers(5, 60))]


def read(loader: DataLoader, steps: int, found: list[int], ends: np.ndarray | None = None) -> None:
    """Adds the inputs of these steps to `found`; given the last tokens of documents, checks the labels."""
    for _ in range(steps):
        for batch in loader.next_step():
            assert batch.segments is not None
            inputs = batch.segments >= 0
            found += batch.tokens[inputs].tolist()
            if ends is None:
                continue
            inner = inputs & ~np.isin(batch.tokens, ends)
            np.testing.assert_array_equal(batch.labels[inner], batch.tokens[inner] + 1)
            assert (batch.loss_mask[inner] == 1).all() and (batch.loss_mask[~inputs] == 0).all()


def loader_of(dataset: Any, **settings: Any) -> DataLoader:
    return DataLoader(dataset, 1, 1, eod_id=EOD, reset_attention_mask=True, num_workers=0, **settings)


def consume(indexed: IndexedDataset, seed: int, phases: list[Taken]) -> None:
    """Reads these phases, and then the rest of an epoch token by token; each token must have come once an epoch."""
    history: list[Taken] = []
    found: list[int] = []
    total, ends = indexed.num_tokens, np.cumsum(indexed.lengths) - 1

    def read_phase(phase: Taken) -> None:
        seq_length, packing, samples = phase
        dataset = GPTDataset(
            indexed, range(len(indexed)), samples, seq_length, seed, packing=packing, history=history
        )
        assert len(dataset) == samples
        read(loader_of(dataset), samples, found, ends)
        history.append(phase)

    for phase in phases:
        read_phase(phase)
    counts = Counter(found)
    longest = max(phase.seq_length for phase in phases)
    assert max(counts.values()) - min(counts[token] for token in range(total)) <= 2 + longest // total
    epochs = -(-len(found) // total) + longest // total + 1
    read_phase(Taken(1, "concat", epochs * total - len(found)))
    assert Counter(found) == dict.fromkeys(range(total), epochs)


@pytest.mark.parametrize("number", range(60))
def test_each_token_of_each_epoch_is_an_input_once(make_prefix: MakePrefix, number: int) -> None:
    """Random layouts, half of them of data shorter than some samples."""
    random = np.random.default_rng(number)
    lengths = lengths_of(random) if number % 2 else random.integers(1, 6, 3).tolist()
    phases = []
    for _ in range(random.integers(1, 5 if number % 2 else 9)):
        seq_length = int(random.choice([1, 2, 5, 16, 64, 200] if number % 2 else [2, 3, 4, 5, 7, 25]))
        packing = random.choice(["concat", "concat", "best_fit"])
        phases.append(Taken(seq_length, packing, int(random.integers(1, 3 * sum(lengths) // seq_length + 3))))
    consume(IndexedDataset(make_prefix(lengths)), number, phases)


@pytest.mark.parametrize(
    ("lengths", "seed", "phases"),
    [
        ([4, 3, 2], 926, [(4, 1), (7, 1), (3, 1), (5, 2), (2, 1)]),
        ([4, 1, 3], 1897, [(2, 6), (7, 5), (3, 1), (7, 3), (5, 1), (2, 4), (4, 5)]),
    ],
)
def test_samples_that_reach_through_the_whole_next_epoch(
    make_prefix: MakePrefix, lengths: list[int], seed: int, phases: list[tuple[int, int]]
) -> None:
    consume(IndexedDataset(make_prefix(lengths)), seed, [Taken(length, "concat", n) for length, n in phases])


def test_the_same_layout_just_goes_on(make_prefix: MakePrefix) -> None:
    indexed = IndexedDataset(make_prefix([13, 40, 7, 22]))

    def samples(count: int, *history: Taken) -> list[list[int]]:
        dataset = GPTDataset(indexed, range(4), count, 8, 3, history=history)
        return dataset.batch(range(count)).tolist()

    assert samples(17, Taken(8, "concat", 13)) == samples(30)[13:]
    assert (
        samples(17, Taken(8, "concat", 5), Taken(4, "concat", 0), Taken(8, "concat", 8)) == samples(30)[13:]
    )


def test_pieces_of_a_document_that_were_not_taken_are_one_again() -> None:
    tokens = Tokens(np.array([40, 3, 17], np.int32), range(3), 6)
    for samples in range(1, 15):
        rest = start_after(tokens, [Taken(4, "best_fit", samples)]).rest
        assert rest.tolist() == sorted(rest.tolist())
        for (document, _, end), (following, begin, _) in itertools.pairwise(rest.tolist()):
            assert (document, end) != (following, begin)
        assert (rest[:, 2] - rest[:, 1]).sum() >= 60 - 4 * samples


def test_histories_are_merged() -> None:
    a, b = Taken(8, "concat", 2), Taken(4, "concat", 3)
    empty = Taken(2, "concat", 0)
    assert merged([empty, a, a, empty, a, b, a]) == [a._replace(samples=6), b, a]


class Simulation:
    """A run that is stopped and started again with other settings, as `training.loop` does it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = self.consumed = 0
        self.saved: dict[str, Any] | None = None
        self.inputs: list[list[int]] = []

    def config(self, steps: int, batch: int, seq_length: int = 8, seed: int = 1, **data: Any) -> Config:
        model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": seq_length}
        data = {"split": "1", "tokenizer": "byte", "reset_attention_mask": True} | data
        train = {"micro_batch_size": 1, "global_batch_size": batch, "output_dir": "unused", "seed": seed}
        tree = {"model": model, "data": data, "train": train | {"steps": steps}, "optimizer": {"lr": 0.001}}
        return build_config(tree).with_vocab_size(2 * EOD)

    def job(self, config: Config, steps: int, ranks: int = 1, ends: np.ndarray | None = None) -> RunData:
        data = build_run(config, self.step, self.consumed, self.saved)
        place = {"consumed_samples": self.consumed, "first_sample": data.position.first}
        loaders = [make_loader(config, data.train, EOD, rank, ranks, **place) for rank in range(ranks)]
        found: list[int] = []
        for _ in range(steps):
            for loader in loaders:
                read(loader, 1, found, ends)
        self.inputs.append(found)
        self.step, self.consumed = self.step + steps, loaders[0].consumed_samples
        self.saved = json.loads(json.dumps(data.state(self.consumed)))
        return data


@pytest.mark.parametrize("number", range(12))
def test_nothing_is_lost_or_repeated_whatever_changes(
    make_prefix: MakePrefix, tmp_path: Path, number: int
) -> None:
    random = np.random.default_rng(100 + number)
    lengths = [lengths_of(random) for _ in range(4)]
    prefixes = [
        make_prefix(own, f"d{k}", np.arange(sum(own), dtype=np.int32) + k * APART)
        for k, own in enumerate(lengths)
    ]
    ends = np.concatenate([np.cumsum(own) + k * APART - 1 for k, own in enumerate(lengths)])
    run = Simulation(tmp_path)
    for _ in range(5):
        ranks = int(random.choice([1, 2, 4]))
        used = random.permutation(4)[: random.integers(1, 5)]
        train = [[round(float(random.random()) + 0.1, 2), prefixes[k]] for k in used]
        config = run.config(
            run.step + 9,
            ranks * int(random.integers(1, 4)),
            int(random.choice([3, 8, 16])),
            int(random.integers(5)),
            train=train,
            packing=str(random.choice(["concat", "concat", "best_fit"])),
        )
        run.job(config, int(random.integers(1, 5)), ranks, ends)
        run.job(config, int(random.integers(0, 4)), ranks, ends)  # a restart of the same
    counts = Counter(token for found in run.inputs for token in found)
    assert run.saved is not None
    for entry in run.saved["sources"]:
        source = prefixes.index(entry["prefix"])
        total = sum(lengths[source])
        own = {token: n for token, n in counts.items() if token // APART == source}
        history = [Taken(*taken) for taken in entry["history"]]
        history.append(Taken(run.saved["seq_length"], run.saved["packing"], entry["given"]))
        left = 20 * total - sum(own.values())
        rest = GPTDataset(
            IndexedDataset(prefixes[source]),
            range(len(lengths[source])),
            left,
            1,
            entry["seed"],
            history=history,
        )
        for token in rest.batch(range(left))[:, 0].tolist():
            own[token] = own.get(token, 0) + 1
        assert own == dict.fromkeys(range(source * APART, source * APART + total), 20)


def two_sources(make_prefix: MakePrefix) -> tuple[str, str]:
    ids = np.arange(240, dtype=np.int32)
    return make_prefix([30] * 8, "a", ids), make_prefix([30] * 8, "b", ids + APART)


def test_unchanged_settings_go_on_in_the_same_dataset(make_prefix: MakePrefix, tmp_path: Path) -> None:
    a, b = two_sources(make_prefix)
    whole, parts = Simulation(tmp_path), Simulation(tmp_path)
    train = [[0.7, a], [0.3, b]]
    whole.job(whole.config(12, 4, train=train), 12)
    data = [parts.job(parts.config(12, 4, train=t), 4) for t in (train, train, [[7, a], [3, b]])]
    assert [found for job in parts.inputs for found in job] == whole.inputs[0]
    assert [d.position.first for d in data] == [0, 0, 0], "weights of the same proportions are the same"


def test_data_that_have_begun_keep_their_order(
    make_prefix: MakePrefix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = two_sources(make_prefix)
    whole, parts = Simulation(tmp_path), Simulation(tmp_path)
    train = [[0.7, a], [0.3, b]]
    whole.job(whole.config(8, 4, train=train), 8)
    parts.job(parts.config(8, 4, train=train), 4)
    with caplog.at_level(logging.INFO):
        parts.job(parts.config(8, 4, train=train, seed=2), 4)
    assert parts.inputs[0] + parts.inputs[1] == whole.inputs[0]
    assert "data that have begun keep the order they have" in caplog.text
    assert "goes on after" not in caplog.text, "nothing to say where the mixture is the same"


def test_a_run_of_old_checkpoints_goes_on(make_prefix: MakePrefix, tmp_path: Path) -> None:
    a, _ = two_sources(make_prefix)
    whole, parts = Simulation(tmp_path), Simulation(tmp_path)
    whole.job(whole.config(8, 4, train=a), 8)
    parts.job(parts.config(8, 4, train=a), 3)
    parts.saved = None
    parts.job(parts.config(8, 4, train=a), 5)
    assert parts.inputs[0] + parts.inputs[1] == whole.inputs[0]


def test_a_source_that_comes_and_goes(
    make_prefix: MakePrefix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = two_sources(make_prefix)
    run = Simulation(tmp_path)
    run.job(run.config(20, 4, train=[[1, a], [1, b]]), 2)
    with caplog.at_level(logging.INFO):
        run.job(run.config(20, 4, train=a), 2)
        data = run.job(run.config(20, 4, train=[[1, b], [1, a]]), 2)
    assert "b is left out from sample 8 on" in caplog.text
    assert "b goes on after the 4 samples it gave" in caplog.text
    assert "a goes on after the 12 samples it gave" in caplog.text
    assert data.position.first == 16 and len(data.train) == 80 - 16
    counts = Counter(token for found in run.inputs for token in found)
    assert max(counts.values()) == 1


def test_files_that_moved_are_known_again(make_prefix: MakePrefix, tmp_path: Path) -> None:
    a, b = two_sources(make_prefix)
    run = Simulation(tmp_path)
    run.job(run.config(20, 4, train=[[1, a], [1, b]]), 2)
    (tmp_path / "elsewhere").mkdir()
    for end in (".bin", ".idx"):
        Path(a + end).rename(tmp_path / "elsewhere" / f"c{end}")
    moved = str(tmp_path / "elsewhere" / "c")
    data = run.job(run.config(20, 4, train=[[1, moved], [1, b]]), 2)
    assert data.position.first == 0 and [s.prefix for s in data.position.sources] == [moved, b]


def test_other_content_is_another_source(
    make_prefix: MakePrefix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where its lengths are the same."""
    ids = np.arange(240, dtype=np.int32)
    run = Simulation(tmp_path)
    run.job(run.config(20, 4, train=make_prefix([30] * 8, "a", ids)), 2)
    data = run.job(run.config(20, 4, train=make_prefix([30] * 8, "a", ids + 1)), 2)
    assert data.position.first == 8 and [s.weight for s in data.position.sources] == [1.0, 0.0]
    assert "holds other data than when the checkpoint was written" in caplog.text


def test_a_source_listed_twice_gives_different_samples_after_a_change(
    make_prefix: MakePrefix, tmp_path: Path
) -> None:
    a, _ = two_sources(make_prefix)
    run = Simulation(tmp_path)
    run.job(run.config(20, 4, train=[[3, a], [1, a]]), 2)
    data = run.job(run.config(20, 4, train=[[1, a], [1, a]]), 2)
    assert [[taken.samples for taken in s.history] for s in data.position.sources] == [[6], [2]]


@pytest.mark.parametrize("change", ["seq_length", "mixture", "order"])
def test_megatrons_order_cannot_change_within_a_run(
    make_prefix: MakePrefix, tmp_path: Path, change: str
) -> None:
    a, b = two_sources(make_prefix)
    run = Simulation(tmp_path)
    run.job(run.config(20, 4, train=a, order="megatron"), 2)
    run.job(run.config(20, 8, train=a, order="megatron"), 1)
    settings: dict[str, Any] = {"train": a, "order": "megatron"}
    settings |= {
        "seq_length": {"seq_length": 4},
        "mixture": {"train": [[1, a], [1, b]]},
        "order": {"order": "epoch"},
    }[change]
    with pytest.raises(DatasetError, match="the samples' order is a function of the whole run") as error:
        build_run(run.config(20, 4, **settings), run.step, run.consumed, run.saved)
    assert str(error.value).count("data.order was megatron and is epoch") == (change == "order")


def test_megatrons_order_of_another_length_gives_a_warning(
    make_prefix: MakePrefix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = two_sources(make_prefix)
    run = Simulation(tmp_path)
    run.job(run.config(20, 4, train=a, order="megatron"), 2)
    run.job(run.config(30, 4, train=a, order="megatron"), 2)
    assert "was made for 80 samples, and the run now takes 120" in caplog.text


def test_data_without_a_token_are_named(make_prefix: MakePrefix, tmp_path: Path) -> None:
    run = Simulation(tmp_path)
    with pytest.raises(DatasetError, match="the train split is empty"):
        build_run(run.config(2, 4, train=make_prefix([0, 0])))


def test_a_finished_run_can_be_asked_again(make_prefix: MakePrefix, tmp_path: Path) -> None:
    a, _ = two_sources(make_prefix)
    run = Simulation(tmp_path)
    run.job(run.config(2, 4, train=a), 2)
    assert len(build_run(run.config(2, 4, 4, train=a), 2, 8, run.saved).train) == 1
