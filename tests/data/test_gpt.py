import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.data import DatasetError, GPTDataset, IndexedDataset
from megatron_lite.data.rest import Taken

from .conftest import MakePrefix


def test_samples_are_runs_of_the_stream(make_prefix: MakePrefix) -> None:
    indexed = IndexedDataset(make_prefix([5, 0, 9, 1, 6]))
    dataset = GPTDataset(indexed, range(5), 40, 4, seed=1)
    assert len(dataset) == 40
    ends = {4, 13, 14, 20}
    for sample in range(40):
        tokens = dataset[sample].tolist()
        assert dataset[sample].dtype == np.int64 and len(tokens) == 5
        for here, following in itertools.pairwise(tokens):
            assert following == here + 1 or here in ends, (
                "tokens follow each other except at a document's end"
            )


def test_a_batch_is_its_samples(make_prefix: MakePrefix) -> None:
    dataset = GPTDataset(IndexedDataset(make_prefix([50, 60])), range(2), 20, 8, seed=1)
    np.testing.assert_array_equal(dataset.batch([3, 0, 7]), np.stack([dataset[3], dataset[0], dataset[7]]))


@pytest.mark.parametrize("sample", [-1, 20])
def test_there_is_nothing_outside(make_prefix: MakePrefix, sample: int) -> None:
    dataset = GPTDataset(IndexedDataset(make_prefix([50, 60])), range(2), 20, 8, seed=1)
    with pytest.raises(IndexError, match="of 20"):
        dataset[sample]


def test_only_the_splits_documents_are_read(make_prefix: MakePrefix) -> None:
    dataset = GPTDataset(IndexedDataset(make_prefix([10] * 10)), range(3, 5), 30, 4, seed=2)
    assert set(dataset.batch(range(30)).ravel().tolist()) == set(range(30, 50))


@pytest.mark.parametrize(
    ("lengths", "documents"), [([5, 5], range(1, 1)), ([5, 0], range(1, 2)), ([], range(0))]
)
def test_an_empty_split_names_split_and_prefix(
    make_prefix: MakePrefix, lengths: list[int], documents: range
) -> None:
    prefix = make_prefix(lengths)
    with pytest.raises(DatasetError, match="the valid split is empty") as caught:
        GPTDataset(IndexedDataset(prefix), documents, 3, 4, seed=1, name="valid")
    assert prefix in str(caught.value) and "data.split" in str(caught.value)


def test_one_epoch_of_too_few_tokens_is_refused(make_prefix: MakePrefix) -> None:
    indexed = IndexedDataset(make_prefix([8]))
    assert len(GPTDataset(indexed, range(1), None, 7, seed=1)) == 1
    with pytest.raises(DatasetError, match="8 tokens, too few"):
        GPTDataset(indexed, range(1), None, 8, seed=1)


def test_changed_data_or_settings_never_meet_an_old_index(make_prefix: MakePrefix, tmp_path: Path) -> None:
    """The cache is beside the data; each of these must build its own entry."""

    def build(lengths: list[int], documents: range, *settings: int, **more: Any) -> None:
        GPTDataset(IndexedDataset(make_prefix(lengths)), documents, *settings, **more)

    build([10, 20, 30], range(3), 5, 4, 1)
    variants = [
        ([10, 21, 29], range(3), 5, 4, 1),
        ([10, 20, 30], range(2), 5, 4, 1),
        ([10, 10, 10], range(2), 5, 4, 1),
        ([10, 10, 10], range(1, 3), 5, 4, 1),
        ([10, 20, 30], range(3), 6, 4, 1),
        ([10, 20, 30], range(3), 5, 3, 1),
        ([10, 20, 30], range(3), 5, 4, 2),
    ]
    for number, (lengths, documents, *settings) in enumerate(variants, 2):
        build(lengths, documents, *settings)
        assert len(list((tmp_path / "index_cache").glob("*/key.json"))) == number
    build([10, 20, 30], range(3), 5, 4, 1, order="megatron")
    assert len(list((tmp_path / "index_cache").glob("*/key.json"))) == 9
    for number, more in enumerate(({"packing": "best_fit"}, {"history": [Taken(8, "concat", 2)]}), 10):
        build([10, 20, 30], range(3), 5, 4, 1, **more)
        assert len(list((tmp_path / "index_cache").glob("*/key.json"))) == number
    build([10, 20, 30], range(3), 5, 4, 1)
    build([10, 20, 30], range(3), 3, 4, 1, history=[Taken(4, "concat", 2)])
    assert len(list((tmp_path / "index_cache").glob("*/key.json"))) == 11, (
        "the same samples from the third on"
    )


def test_a_cached_index_reads_the_same_samples(make_prefix: MakePrefix, tmp_path: Path) -> None:
    indexed = IndexedDataset(make_prefix([10, 20, 30]))
    first, second = (
        GPTDataset(indexed, range(3), 50, 4, seed=1, cache_dir=tmp_path / "elsewhere") for _ in range(2)
    )
    np.testing.assert_array_equal(first.batch(range(50)), second.batch(range(50)))
    assert not (tmp_path / "index_cache").exists()
