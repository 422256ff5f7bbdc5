from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config import DataConfig
from megatron_lite.data import DatasetError, SampleDataset, build_dataset, build_datasets
from megatron_lite.data.build import Split

from .conftest import MakePrefix


def tokens_of(dataset: SampleDataset | None) -> set[int]:
    assert dataset is not None
    return set(dataset.batch(range(len(dataset))).ravel().tolist())


def config(**settings: Any) -> DataConfig:
    return DataConfig(**settings)


def test_one_prefix_is_divided_by_split(make_prefix: MakePrefix) -> None:
    train, valid, test = build_datasets(
        config(train=make_prefix([10] * 10), split="8,1,1"),
        5,
        1,
        train_samples=40,
        valid_samples=6,
        test_samples=6,
    )
    assert [len(train), len(valid or []), len(test or [])] == [40, 6, 6]
    assert tokens_of(train) == set(range(80))
    assert tokens_of(valid) == set(range(80, 90)) and tokens_of(test) == set(range(90, 100))


def test_splits_of_their_own_files_are_whole(make_prefix: MakePrefix) -> None:
    prefixes = {name: make_prefix([10] * 4, name) for name in ("train", "valid")}
    train, valid, test = build_datasets(config(**prefixes), 5, 1, 20, 20, 20)
    assert tokens_of(train) == tokens_of(valid) == set(range(40))
    assert test is None


def test_what_is_not_asked_for_is_not_built(make_prefix: MakePrefix) -> None:
    """A split that would be empty only matters where its samples are wanted."""
    settings = config(train=make_prefix([10, 10]), split="969,30,1")
    train, valid, test = build_datasets(settings, 5, 1, 4)
    assert len(train) == 4 and valid is None and test is None
    with pytest.raises(DatasetError, match="valid split is empty"):
        build_datasets(settings, 5, 1, 4, 4)


def test_a_share_of_zero_is_no_dataset(make_prefix: MakePrefix) -> None:
    settings = config(train=make_prefix([10, 10]), split="1,0,0")
    _, valid, _ = build_datasets(settings, 5, 1, 4, 4)
    assert valid is None
    with pytest.raises(DatasetError, match=r'data\.split: "0,1,0" is not one to three sizes'):
        build_datasets(config(train=make_prefix([10, 10]), split="0,1,0"), 5, 1, 4)
    with pytest.raises(DatasetError, match="0 training samples"):
        build_datasets(settings, 5, 1, 0)


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_one_split_alone_is_the_same_and_no_other_is_indexed(
    make_prefix: MakePrefix, tmp_path: Path, name: Split
) -> None:
    settings = config(train=make_prefix([10] * 10), split="8,1,1", cache_dir=str(tmp_path / "cache"))
    alone = build_dataset(settings, name, 5, 1, 6)
    assert alone is not None
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    together = build_datasets(settings, 5, 1, 6, 6, 6)[("train", "valid", "test").index(name)]
    assert together is not None
    np.testing.assert_array_equal(alone.batch(range(6)), together.batch(range(6)))
    assert build_dataset(settings, name, 5, 1, 0) is None


def test_no_training_data_is_an_error() -> None:
    with pytest.raises(DatasetError, match=r"data\.train is not set"):
        build_datasets(config(), 5, 1, 4)


def test_the_data_once(make_prefix: MakePrefix) -> None:
    train, _, _ = build_datasets(config(train=make_prefix([51]), split="1"), 5, 1, None)
    assert len(train) == 10


@pytest.mark.parametrize("order", ["epoch", "megatron"])
def test_a_weighted_blend(make_prefix: MakePrefix, order: str) -> None:
    pairs = ((3.0, make_prefix([100], "a")), (1.0, make_prefix([100], "b", np.arange(1000, 1100))))
    train, _, _ = build_datasets(config(train=pairs, split="1", order=order), 5, 1, 80)
    origin = train.batch(range(80))[:, 0] >= 1000
    assert len(train) == 80 and origin.sum() == 20
    assert 0 < origin[:20].sum() < 10, "mixed from the beginning"


def test_a_blend_has_as_many_samples_as_asked_whatever_the_rounding(make_prefix: MakePrefix) -> None:
    """Each dataset is built for exactly what the blend takes: no margin that may not do."""
    pairs = tuple((1.0, make_prefix([7 + i], f"d{i}")) for i in range(30))
    train, _, _ = build_datasets(config(train=pairs, split="1"), 5, 1, 101)
    assert len(train) == 101 and train.batch(range(101)).shape == (101, 6)


def test_a_blend_shorter_than_its_list(make_prefix: MakePrefix) -> None:
    pairs = ((2.0, make_prefix([100], "a")), (1.0, make_prefix([100], "b", np.arange(1000, 1100))))
    train, _, _ = build_datasets(config(train=pairs, split="1"), 5, 1, 1)
    assert len(train) == 1 and max(tokens_of(train)) < 1000


def test_prefixes_without_weights_count_by_their_tokens(make_prefix: MakePrefix) -> None:
    prefixes = (make_prefix([300], "a"), make_prefix([100], "b", np.arange(1000, 1100)))
    train, _, _ = build_datasets(config(train=prefixes, split="1"), 5, 1, 400)
    assert len(train) == 400 and (train.batch(range(400))[:, 0] >= 1000).sum() == 100


def test_prefixes_without_weights_once(make_prefix: MakePrefix) -> None:
    prefixes = (make_prefix([301], "a"), make_prefix([101], "b", np.arange(1000, 1101)))
    train, _, _ = build_datasets(config(train=prefixes, split="1"), 5, 1, None)
    assert len(train) == 80 and len(tokens_of(train)) == 402


def test_weights_have_no_natural_length(make_prefix: MakePrefix) -> None:
    pairs = ((1.0, make_prefix([50], "a")), (1.0, make_prefix([50], "b")))
    with pytest.raises(DatasetError, match="name a number of samples"):
        build_datasets(config(train=pairs, split="1"), 5, 1, None)


def test_a_zero_weight_drops_out_and_an_absent_file_is_named(make_prefix: MakePrefix) -> None:
    train, _, _ = build_datasets(config(train=((0.0, "absent"), (1.0, make_prefix([50])))), 5, 1, 10)
    assert len(train) == 10
    with pytest.raises(DatasetError, match=r"absent\.idx: no such file"):
        build_datasets(config(train=((0.1, "absent"), (1.0, make_prefix([50])))), 5, 1, 10)
