import logging

import numpy as np
import pytest

from megatron_lite.data import BlendedDataset, DatasetError, GPTDataset, IndexedDataset
from megatron_lite.data.blend import blend_index, used_members

from .conftest import MakePrefix


def greedy(weights: list[float], size: int, limits: list[int] | None = None) -> list[tuple[int, int]]:
    total = float(np.sum(np.array(weights)))
    shares = [weight / total for weight in weights]
    taken = [0] * len(shares)
    order = []
    for n in range(size):
        behind = [
            share * max(n, 1) - count if limits is None or count < limits[i] else -np.inf
            for i, (share, count) in enumerate(zip(shares, taken, strict=True))
        ]
        chosen = int(np.argmax(behind))
        order.append((chosen, taken[chosen]))
        taken[chosen] += 1
    return order


@pytest.mark.parametrize("number", range(10))
def test_the_order_is_megatrons_greedy_rule(number: int) -> None:
    random = np.random.default_rng(number)
    weights = random.random(random.integers(1, 9)).tolist()
    dataset, sample = blend_index(weights, 300)
    assert dataset.dtype == np.int16 and sample.dtype == np.int64
    assert list(zip(dataset.tolist(), sample.tolist(), strict=True)) == greedy(weights, 300)


@pytest.mark.parametrize("number", range(10))
def test_limited_datasets_are_used_up_and_passed_over(number: int) -> None:
    random = np.random.default_rng(number)
    lengths = random.integers(1, 60, random.integers(1, 9)).tolist()
    dataset, sample = blend_index(lengths, sum(lengths), lengths)
    assert list(zip(dataset.tolist(), sample.tolist(), strict=True)) == greedy(lengths, sum(lengths), lengths)
    assert np.bincount(dataset).tolist() == lengths


def test_every_beginning_has_the_asked_proportions() -> None:
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    dataset, _ = blend_index(weights.tolist(), 1000)
    for n in range(1, 1000, 37):
        assert np.abs(np.bincount(dataset[:n], minlength=4) - weights * n).max() <= 1.5


def test_more_than_the_datasets_have_is_refused() -> None:
    with pytest.raises(IndexError):
        blend_index([1, 1], 5, [2, 2])


def test_weights_are_checked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert used_members([(0.0, "a"), (2.0, "b"), (1, "c")]) == [(2.0, "b"), (1, "c")]
    assert "a: weight 0 in the blend, left out" in caplog.text
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DatasetError, match="b: weight"):
            used_members([(1.0, "a"), (weight, "b")])
    with pytest.raises(DatasetError, match="above zero"):
        used_members([(0.0, "a")])
    with pytest.raises(DatasetError, match="32,767 at most"):
        used_members([(1.0, "a")] * 32768)


def test_samples_come_from_the_datasets_in_turn(make_prefix: MakePrefix) -> None:
    datasets = [
        GPTDataset(IndexedDataset(make_prefix([40] * 3, name)), range(3), 10, 4, seed=1)
        for name in ("a", "b")
    ]
    blend = BlendedDataset(datasets, (np.array([0, 1, 0], np.int16), np.array([0, 5, 1])))
    assert len(blend) == 3
    expected = np.stack([datasets[0][0], datasets[1][5], datasets[0][1]])
    np.testing.assert_array_equal(blend.batch(range(3)), expected)
    with pytest.raises(IndexError, match="of 3 of the blend"):
        blend[3]
    with pytest.raises(DatasetError, match="dataset 1 of the blend has 10 samples, the blend takes 11"):
        BlendedDataset(datasets, (np.ones(11, np.int16), np.arange(11)))
