"""The two orders against plain Python that joins the whole stream."""

from typing import Any

import numpy as np
import pytest

from megatron_lite.data import DatasetError, _index, sample_index
from megatron_lite.data.sample_index import (
    NO_SPANS,
    Tokens,
    epoch_order,
    megatron_order,
    packed_order,
    split_edges,
)

MASK = 2**64 - 1


class SplitMix64:
    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def shuffled(values: list[int], seed: int, epoch: int, stream: int) -> list[int]:
    state = SplitMix64(seed).next()
    state = SplitMix64(state ^ epoch).next()
    random = SplitMix64(SplitMix64(state ^ stream).next())
    values = list(values)
    for i in range(len(values) - 1, 0, -1):
        bound = i + 1
        while (draw := random.next()) < 2**64 % bound:
            pass
        j = draw % bound
        values[i], values[j] = values[j], values[i]
    return values


def samples_of(order: dict, lengths: list[int], seq_length: int) -> list[list[int]]:
    """Every sample's tokens, where token ids number the tokens of the file."""
    starts = np.concatenate(([0], np.cumsum(lengths)))
    samples = []
    for position, offset in order["starts"].tolist():
        tokens: list[int] = []
        while len(tokens) < seq_length + 1:
            document = order["documents"][position]
            tokens += range(starts[document] + offset, starts[document + 1])
            position, offset = position + 1, 0
        samples.append(tokens[: seq_length + 1])
    return samples


def epoch_reference(
    lengths: list[int], documents: range, count: int | None, seq_length: int, seed: int
) -> list[list[int]]:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    total = sum(lengths[d] for d in documents)
    stream: list[int] = []

    def extend(epoch: int) -> None:
        for document in shuffled(list(documents), seed, epoch, 0):
            stream.extend(range(starts[document], starts[document + 1]))

    order: list[int] = []
    if count is None:
        extend(0)
        order = shuffled(list(range((total - 1) // seq_length)), seed, 0, 1)
    else:
        epoch = 0
        while len(order) < count:
            firsts = list(range(-(-epoch * total // seq_length), -(-(epoch + 1) * total // seq_length)))
            places = shuffled(list(range(len(firsts))), seed, epoch, 1)
            order += [firsts[place] for place in places]
            epoch += 1
        order = order[:count]
        for extra in range(epoch + seq_length // total + 2):
            extend(extra)
    return [stream[k * seq_length : k * seq_length + seq_length + 1] for k in order]


def megatron_reference(
    lengths: list[int], documents: range, count: int | None, seq_length: int, seed: int
) -> list[list[int]]:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    total = sum(lengths[d] for d in documents)
    epochs = 1
    while count is not None and epochs * total < count * seq_length + 1:
        epochs += 1
    apart = False
    before = ((epochs - 1) * total - 1) // seq_length
    if epochs > 1:
        assert count is not None
        apart = count - before < int(0.80 * ((total - 1) // seq_length))
    random = np.random.RandomState(seed)

    def mixed(copies: int) -> np.ndarray:
        index = np.array(list(documents) * copies, dtype=np.int32)
        random.shuffle(index)
        return index

    index = np.concatenate((mixed(epochs - 1), mixed(1))) if apart else mixed(epochs)
    stream = [token for d in index for token in range(starts[d], starts[d + 1])]
    samples = (epochs * total - 1) // seq_length
    if apart:
        first, second = np.arange(before), np.arange(before, samples)
        random.shuffle(first)
        random.shuffle(second)
        order = np.concatenate((first, second))
    else:
        order = np.arange(samples)
        random.shuffle(order)
    return [stream[k * seq_length : k * seq_length + seq_length + 1] for k in order]


def random_case(number: int) -> tuple[list[int], range, int | None, int, int]:
    random = np.random.default_rng(number)
    lengths = random.integers(0, random.integers(2, 60), random.integers(2, 40)).tolist()
    first = int(random.integers(0, len(lengths) // 2))
    documents = range(first, int(random.integers(first + 1, len(lengths) + 1)))
    lengths[documents[0]] += 20
    seq_length = int(random.choice([1, 2, 5, 16, 64]))
    epochs = float(random.choice([0.3, 1.0, 2.2, 3.9]))
    count = max(1, int(epochs * sum(lengths[d] for d in documents) / seq_length))
    return lengths, documents, None if number % 7 == 0 else count, seq_length, number * 1000003 % 2**31


@pytest.mark.parametrize("number", range(40))
def test_epoch_order_is_the_reference(number: int) -> None:
    lengths, documents, count, seq_length, seed = random_case(number)
    order = epoch_order(Tokens(np.array(lengths, np.int32), documents, seed), count, seq_length)
    expected = epoch_reference(lengths, documents, count, seq_length, seed)
    assert samples_of(order, lengths, seq_length) == expected
    assert len(expected) == (count if count is not None else len(expected))


@pytest.mark.parametrize("number", range(40))
def test_megatron_order_is_the_reference(number: int) -> None:
    lengths, documents, count, seq_length, seed = random_case(number)
    order = megatron_order(Tokens(np.array(lengths, np.int32), documents, seed), count, seq_length)
    expected = megatron_reference(lengths, documents, count, seq_length, seed)
    assert samples_of(order, lengths, seq_length) == expected


@pytest.mark.parametrize("count", [179, 180, 189])
def test_megatrons_last_epoch_is_apart_below_80_percent(count: int) -> None:
    """100 samples an epoch: 79 of the second are fewer than 80%, 80 are not."""
    lengths = [11] * 91
    order = megatron_order(Tokens(np.array(lengths, np.int32), range(91), 4), count, 10)
    assert samples_of(order, lengths, 10) == megatron_reference(lengths, range(91), count, 10, 4)
    first_epoch = set(order["documents"][:91].tolist())
    assert (len(first_epoch) == 91) == (count == 179), "apart, the first epoch has every document"


def test_each_epoch_has_every_token_once_before_the_next_begins() -> None:
    """Documents of whole samples: the first tokens of the samples say what was seen."""
    lengths = [8] * 30
    order = epoch_order(Tokens(np.array(lengths, np.int32), range(30), 5), 180, 4)
    seen = [
        [token for sample in samples_of(order, lengths, 4)[e * 60 : e * 60 + 60] for token in sample[:4]]
        for e in range(3)
    ]
    assert all(sorted(tokens) == list(range(240)) for tokens in seen)
    assert seen[0] != seen[1] != seen[2], "each epoch has an order of its own"


def test_more_samples_only_add_to_the_end() -> None:
    lengths = np.array([13, 7, 50, 1, 22], np.int32)
    long = samples_of(epoch_order(Tokens(lengths, range(5), 3), 200, 8), lengths.tolist(), 8)
    for count in (1, 5, 11, 12, 13, 60, 199):
        assert (
            samples_of(epoch_order(Tokens(lengths, range(5), 3), count, 8), lengths.tolist(), 8)
            == long[:count]
        )


def test_seeds_give_unrelated_orders() -> None:
    lengths = np.full(100, 9, np.int32)
    orders = [
        epoch_order(Tokens(lengths, range(100), seed), 100, 8)["documents"][:100].tolist()
        for seed in range(20)
    ]
    assert len({tuple(order) for order in orders}) == 20
    same_place = np.mean([[a == b for a, b in zip(orders[0], other, strict=True)] for other in orders[1:]])
    assert same_place < 0.05


def test_the_shuffle_is_fair() -> None:
    """Every value in every place about equally often: chi-squared over 5 x 5, 16 degrees of freedom."""
    counts = np.zeros((5, 5))
    for seed in range(4000):
        values = np.arange(5, dtype=np.int32)
        _index.shuffle(values, seed, 0, 0)
        counts[np.arange(5), values] += 1
    assert ((counts - 800) ** 2 / 800).sum() < 45


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_shuffle_is_the_published_generator(dtype: type) -> None:
    values = np.arange(1000, dtype=dtype)
    _index.shuffle(values, 2**64 - 1, 3, 1)
    assert values.tolist() == shuffled(list(range(1000)), 2**64 - 1, 3, 1)


@pytest.mark.parametrize("make", [epoch_order, megatron_order])
def test_counts_and_offsets_are_exact_beyond_float32_and_int32(make: Any) -> None:
    """21.5 billion tokens in ten documents of the longest length there is, and a sample more than two epochs need."""
    longest, seq_length = 2**31 - 1, 200_003
    lengths = np.full(10, longest, np.int32)
    total = 10 * longest
    count = 2 * total // seq_length + 1
    order = make(Tokens(lengths, range(10), 1), count, seq_length)
    assert len(order["starts"]) >= count
    places = order["starts"][:, 0].astype(np.int64) * longest + order["starts"][:, 1]
    assert (np.sort(places) % seq_length == 0).all() and len(np.unique(places)) == len(places)
    if make is epoch_order:
        first = -(-total // seq_length)
        assert places[:first].max() == (first - 1) * seq_length < total <= places[first:-1].min()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("make", [epoch_order, megatron_order, packed_order])
def test_wide_numbers_say_the_same(monkeypatch: pytest.MonkeyPatch, make: Any, number: int) -> None:
    """What streams of more than 2^31 documents would take."""
    lengths, documents, count, seq_length, seed = random_case(number)
    tokens = Tokens(np.array(lengths, np.int32), documents, seed)
    narrow = make(tokens, count, seq_length)
    monkeypatch.setattr(sample_index, "_INT32_MAX", 1)
    wide = make(tokens, count, seq_length)
    assert wide["starts"].dtype == np.int64 and narrow["starts"].dtype == np.int32
    for name in ("documents", "starts"):
        np.testing.assert_array_equal(wide[name], narrow[name])


def starts_of(
    lengths: np.ndarray, documents: list[int], first: int, stride: int, count: int
) -> list[list[int]]:
    rows = np.empty((count, 2), np.int32)
    _index.fill_starts(rows, lengths, np.array(documents, np.int32), NO_SPANS, 0, first, stride)
    return rows.tolist()


def test_the_extension_refuses_what_it_cannot_read() -> None:
    lengths = np.array([3, 4], np.int32)
    with pytest.raises(IndexError):
        starts_of(lengths, [0, 2], 0, 4, 2)
    with pytest.raises(IndexError):
        starts_of(lengths, [0, 1], 0, 4, 3)
    with pytest.raises(ValueError, match="int32"):
        starts_of(lengths.astype(np.int64), [0], 0, 1, 1)
    with pytest.raises(ValueError, match="contiguous"):
        starts_of(np.zeros(8, np.int32)[::2], [0], 0, 1, 1)
    with pytest.raises(ValueError, match="contiguous"):
        _index.shuffle(np.zeros((8, 2), np.int32)[:, ::-1], 0, 0, 0)
    with pytest.raises(ValueError, match="rows of"):
        _index.shuffle(np.zeros((8, 3), np.int32), 0, 0, 0)


def test_unaligned_lengths_are_read() -> None:
    raw = np.zeros(4 * 3 + 2, np.uint8)
    lengths = raw[2:].view(np.int32)
    lengths[:] = [3, 4, 5]
    assert starts_of(lengths, [2, 0, 1], 0, 4, 3) == [[0, 0], [0, 4], [2, 0]], (
        "tokens 0, 4 and 8 of the documents of 5, 3 and 4 tokens"
    )


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_rows_are_shuffled_as_their_numbers(dtype: type, size: int) -> None:
    """What allows a sample index to be shuffled where it lies."""
    numbers, rows = np.arange(size), np.arange(2 * size, dtype=dtype).reshape(size, 2)
    expected = rows.copy()
    _index.shuffle(numbers, 7, 3, 1)
    _index.shuffle(rows, 7, 3, 1)
    assert rows.tolist() == expected[numbers].tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("seed", [0, 1234, 2**32 - 1])
def test_the_legacy_shuffle_is_numpys(dtype: type, seed: int) -> None:
    """One generator for several shuffles, as Megatron has it."""
    ours, theirs = _index.LegacyRandom(seed), np.random.RandomState(seed)
    for size in (0, 1, 2, 129, 70_000):
        mine, their = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
        ours.shuffle(mine)
        theirs.shuffle(their)
        np.testing.assert_array_equal(mine, their)


def test_a_seed_that_numpys_generator_does_not_take_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"less than 2\^32"):
        megatron_order(Tokens(np.array([9], np.int32), range(1), 2**32), 1, 4)


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("969,30,1", 1000, [range(969), range(969, 999), range(999, 1000)]),
        ("100", 7, [range(7), None, None]),
        ("1,1", 5, [range(2), range(2, 5), None]),
        ("1,0,1", 3, [range(2), None, range(2, 3)]),
        ("98,2,0", 5, [range(5), range(5, 5), None]),
        ("50,25,25", 10, [range(5), range(5, 8), range(8, 10)]),
    ],
)
def test_splits_round_as_megatron(split: str, count: int, expected: list) -> None:
    """Half to even: 2.5 of 5 is 2, 7.5 of 10 is 8."""
    assert split_edges(split, count) == expected


@pytest.mark.parametrize(
    "split", ["", "a,b", "1,2,3,4", "0,0,0", "0,1,1", "-1,2", "1,-1", "nan,1", "inf", "1,,1"]
)
def test_a_split_that_makes_no_sense_is_refused(split: str) -> None:
    with pytest.raises(DatasetError, match=r"data\.split"):
        split_edges(split, 10)
