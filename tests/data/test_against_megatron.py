"""Files, samples and blends against Megatron-core itself.

Where megatron-core 0.16 is installed its own output is compared for many random settings. Everywhere else hashes of
that output for some settings, kept here, stand in for it; they are checked against the peer too, where it is.
"""

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_lite.config import DataConfig
from megatron_lite.data import (
    DataLoader,
    DatasetError,
    GPTDataset,
    IndexedDataset,
    IndexedDatasetWriter,
    build_datasets,
    token_dtype,
)
from megatron_lite.data.sample_index import split_edges

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: golden hashes only"
)


class Case(NamedTuple):
    """What is asked: weights None is one prefix, () several prefixes without weights."""

    lengths: list[list[int]]
    weights: list[float] | tuple[()] | None
    seq_length: int
    samples: tuple[int, int, int]
    split: str
    seed: int


def case(number: int) -> Case:
    """A setting that depends on `number` alone (RandomState's stream is fixed for ever)."""
    random = np.random.RandomState(number)
    kind = number % 4
    prefixes = 1 if kind < 2 else random.randint(2, 6)
    lengths = []
    for _ in range(prefixes):
        documents = random.randint(30, 120)
        lengths.append(random.randint(1, random.randint(2, 120), documents).tolist())
    if number % 5 == 0:
        for index in range(0, len(lengths[0]), 7):
            lengths[0][index] = 0
    weights: list[float] | tuple[()] | None = None
    if kind == 2:
        weights = (random.random_sample(prefixes) + 0.05).tolist()
    if kind == 3:
        weights = ()
    seq_length = int(random.choice([3, 8, 16, 64]))
    if kind == 3:
        seq_length = 3  # Megatron refuses a blend with a dataset too short for one sample
    tokens = sum(map(sum, lengths))
    train = max(1, int(random.choice([0.3, 0.9, 1.5, 2.05, 3.7]) * tokens / seq_length))
    split = str(random.choice(["100,0,0", "8,1,1", "0.5,0.25,0.25", "900,50,50"]))
    if kind == 3:
        split = "0.5,0.25,0.25"
    if split == "100,0,0":
        return Case(lengths, weights, seq_length, (train, 0, 0), split, int(random.randint(2**31)))
    return Case(lengths, weights, seq_length, (train, 5, 3), split, int(random.randint(2**31)))


def write(case: Case, folder: Path) -> list[str]:
    random = np.random.RandomState(case.seed % 1000)
    prefixes = []
    for number, lengths in enumerate(case.lengths):
        prefix = folder / f"d{number}"
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for length in lengths:
                writer.add_sequence(random.randint(0, 50257, length).astype(np.uint16))
                writer.end_document()
        prefixes.append(str(prefix))
    return prefixes


def our_samples(case: Case, prefixes: list[str]) -> list[np.ndarray]:
    train: Any = prefixes[0]
    if case.weights == ():
        train = tuple(prefixes)
    elif case.weights is not None:
        train = tuple(zip(case.weights, prefixes, strict=True))  # type: ignore[arg-type]
    config = DataConfig(train=train, split=case.split, order="megatron")
    built = build_datasets(config, case.seq_length, case.seed, *case.samples)
    return [dataset.batch(range(len(dataset))) for dataset in built if dataset is not None]


def digest(splits: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for tokens in splits:
        digest.update(repr(tokens.shape).encode() + tokens.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def their_samples(case: Case, prefixes: list[str], **data: Any) -> list[np.ndarray]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        unique_identifiers = {"class": "none"}  # noqa: RUF012
        pad = eod = 50256
        vocab_size = 50257

    weights = list(case.weights) if case.weights else None
    config = GPTDatasetConfig(
        random_seed=case.seed,
        sequence_length=case.seq_length,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        mid_level_dataset_surplus=0.005,
        **(data or {"blend": (prefixes, weights), "split": case.split}),
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, list(case.samples), lambda: True, config).build()
    return [samples_of(d) for d, asked in zip(built, case.samples, strict=True) if asked and d is not None]


def samples_of(dataset: Any) -> np.ndarray:
    """By Megatron's inner method, which gives the S + 1 tokens without making tensors of them."""
    if hasattr(dataset, "datasets"):
        pairs = zip(dataset.dataset_index, dataset.dataset_sample_index, strict=True)
        return np.stack([one_sample(dataset.datasets[number], sample) for number, sample in pairs])
    return np.stack([one_sample(dataset, sample) for sample in range(len(dataset))])


def one_sample(dataset: Any, sample: int) -> np.ndarray:
    return dataset._query_document_sample_shuffle_indices(sample)[0]


GOLDEN = {
    0: "6552b83739abd8ef",
    1: "c69887d3b2015765",
    2: "c65bb52cfec1da74",
    3: "19565d419fd430f9",
    4: "eadceadda0112f94",
    5: "6d10a4e95e060eb3",
    6: "0f96cbd814292161",
    7: "2e1690903b9d879d",
    8: "4cb6af764bc0a21d",
    9: "355860981f07a34e",
    10: "9a9551093fdc8b30",
    11: "81205564f60a61b3",
    12: "a5df3d215bf34c65",
    13: "51e204a09447d1bb",
    14: "8ba96134e429438c",
    15: "6bcb1d020dfdfbee",
    16: "5d31ca767381ec9e",
    17: "5cc35fa0a6565e21",
    18: "36830d5ea40501ef",
    19: "92ef13827299ea82",
}


@pytest.mark.parametrize("number", GOLDEN)
def test_samples_have_megatrons_hashes(tmp_path: Path, number: int) -> None:
    assert digest(our_samples(case(number), write(case(number), tmp_path))) == GOLDEN[number]


@needs_megatron
@pytest.mark.parametrize("number", range(40))
def test_samples_are_megatrons(tmp_path: Path, number: int) -> None:
    prefixes = write(case(number), tmp_path)
    theirs = their_samples(case(number), prefixes)
    ours = our_samples(case(number), prefixes)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our, their)
    if number in GOLDEN:
        assert digest(theirs) == GOLDEN[number], "the hash kept here is Megatron's"


@needs_megatron
@pytest.mark.parametrize("number", [2, 6, 10, 14])
def test_splits_of_their_own_files_are_megatrons(tmp_path: Path, number: int) -> None:
    """A weighted blend to train on, and one prefix, whose weight does not matter, to validate on."""
    setting = case(number)._replace(samples=(500, 40, 0))
    *train, valid = write(setting, tmp_path)
    weights = list(setting.weights or [])[: len(train)]
    own = {"blend_per_split": [(train, weights), ([valid], [0.3]), None]}
    theirs = their_samples(setting, [], **own)
    pairs = tuple(zip(weights, train, strict=True))
    config = DataConfig(train=pairs, valid=((0.3, valid),), order="megatron")
    built = build_datasets(config, setting.seq_length, setting.seed, 500, 40, 5)
    assert built[2] is None
    if len(train) == 1:
        assert isinstance(built[0], GPTDataset)
    for our, their in zip(built[:2], theirs, strict=True):
        assert our is not None
        np.testing.assert_array_equal(our.batch(range(len(our))), their)


@needs_megatron
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_are_megatrons_byte_for_byte(tmp_path: Path, dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(1)
    documents = [random.integers(0, 50000, random.integers(0, 30)).tolist() for _ in range(200)]
    theirs = IndexedDatasetBuilder(str(tmp_path / "their.bin"), dtype=dtype)
    with IndexedDatasetWriter(tmp_path / "our", dtype) as ours:
        for document in documents:
            ours.add_document(document)
            # As tools/preprocess_data.py of Megatron-LM: no sequence for a text without ids.
            theirs.add_document(
                torch.tensor(document, dtype=torch.int64), [len(document)] if document else []
            )
    theirs.finalize(str(tmp_path / "their.idx"))
    for end in (".bin", ".idx"):
        assert (tmp_path / f"our{end}").read_bytes() == (tmp_path / f"their{end}").read_bytes()


few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any setting that Megatron can build: it loops for ever on an empty split, and refuses a blend without weights
    that has a dataset too short for a sample."""
    prefixes = draw(st.integers(1, 5))
    lengths = [draw(st.lists(st.integers(0, 90), min_size=3, max_size=60)) for _ in range(prefixes)]
    seq_length = draw(st.integers(1, 70))
    split = ",".join(
        map(str, draw(st.tuples(st.integers(1, 1000), st.integers(0, 300), st.integers(0, 300))))
    )
    kind = draw(st.sampled_from([None, (), "weights"]))
    if kind is None:
        lengths = lengths[:1]
    weights: Any = kind
    if kind == "weights":
        weights = [draw(st.floats(0.01, 10.0)) for _ in lengths]
    tokens = sum(map(sum, lengths))
    asked = [draw(st.integers(1, 1 + int(share * tokens / seq_length))) for share in (4.0, 2.0, 2.0)]
    for own in lengths:
        for name, edges in enumerate(split_edges(split, len(own))):
            if edges is None:
                asked[name] = 0
            else:
                assume(sum(own[edges.start : edges.stop]) > (seq_length if kind == () else 0))
    return Case(
        lengths, weights, seq_length, (asked[0], asked[1], asked[2]), split, draw(st.integers(0, 2**32 - 1))
    )


@needs_megatron
@few
@given(cases())
def test_any_samples_are_megatrons(setting: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefixes = write(setting, Path(folder))
        try:
            ours = our_samples(setting, prefixes)
        except DatasetError as error:
            assert "the blend takes" in str(error)
            with pytest.raises((IndexError, AssertionError)):
                their_samples(setting, prefixes)
            return
        theirs = their_samples(setting, prefixes)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our, their)


documents_of_sequences = st.lists(
    st.lists(st.lists(st.integers(0, 65_000), max_size=9), max_size=4), max_size=20
)


@needs_megatron
@few
@given(documents_of_sequences, st.sampled_from([np.uint16, np.int32, np.int64]))
def test_any_files_are_read_and_written_alike(documents: list[list[list[int]]], dtype: type) -> None:
    """Documents of several sequences, of none, and sequences without ids."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Their
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with tempfile.TemporaryDirectory() as folder:
        theirs = IndexedDatasetBuilder(f"{folder}/their.bin", dtype=dtype)
        with IndexedDatasetWriter(f"{folder}/our", dtype) as ours:
            for sequences in documents:
                for sequence in sequences:
                    ours.add_sequence(np.array(sequence, dtype))
                ours.end_document()
                joined = torch.tensor(
                    [token for sequence in sequences for token in sequence], dtype=torch.int64
                )
                theirs.add_document(joined, [len(sequence) for sequence in sequences])
        theirs.finalize(f"{folder}/their.idx")
        for end in (".bin", ".idx"):
            assert Path(f"{folder}/our{end}").read_bytes() == Path(f"{folder}/their{end}").read_bytes()
        expected = [sequence for sequences in documents for sequence in sequences]
        assert [ids.tolist() for ids in IndexedDataset(f"{folder}/their")] == expected
        if any(expected):  # Megatron cannot map an empty file
            read = Their(f"{folder}/our")
            assert [read[number].tolist() for number in range(len(read))] == expected
            assert read.document_indices.tolist() == IndexedDataset(f"{folder}/our").document_bounds.tolist()


@needs_megatron
@pytest.mark.parametrize("vocab_size", [None, 1, 65_499, 65_500, 65_501, 65_535, 65_536, 65_537, 100_000])
def test_types_of_ids_are_megatrons(vocab_size: int | None) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@needs_megatron
@pytest.mark.parametrize("mask_loss", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_masks_and_positions_are_megatrons(tmp_path: Path, mask_loss: bool, restart: bool) -> None:
    """Of dataset[i], with every sixth id or so the end of a document; attention too, as segments."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    class Tokenizer:
        unique_identifiers = {"class": "none"}  # noqa: RUF012
        pad, eod, vocab_size = 99, 3, 100

    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for length in range(5, 60):
            writer.add_document(np.random.default_rng(length).integers(0, 6, length).astype(np.uint16))
    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=16,
        reset_position_ids=restart,
        reset_attention_mask=True,
        eod_mask_loss=mask_loss,
        tokenizer=Tokenizer(),
        blend=([str(tmp_path / "x")], None),
        split="1,0,0",
    )
    their = BlendedMegatronDatasetBuilder(Theirs, [40, 0, 0], lambda: True, config).build()[0]
    ours, _, _ = build_datasets(DataConfig(train=str(tmp_path / "x"), split="1", order="megatron"), 16, 5, 40)
    loader = DataLoader(
        ours, 40, 40, eod_id=3, eod_mask_loss=mask_loss, reset_position_ids=restart, reset_attention_mask=True
    )
    (batch,) = loader.next_step()
    loader.close()
    assert batch.segments is not None
    for number in range(40):
        expected = their[number]
        assert batch.tokens[number].tolist() == expected["tokens"].tolist()
        assert batch.labels[number].tolist() == expected["labels"].tolist()
        assert batch.loss_mask[number].tolist() == expected["loss_mask"].tolist()
        positions = range(16) if batch.position_ids is None else batch.position_ids[number]
        assert list(positions) == expected["position_ids"].tolist()
        segments = batch.segments[number]
        may_see = (segments[:, None] == segments) & np.tri(16, dtype=bool)
        np.testing.assert_array_equal(~may_see, expected["attention_mask"][0].numpy())
