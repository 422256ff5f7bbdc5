import gc
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_lite.config import build_config
from megatron_lite.data import (
    BlendedDataset,
    DataLoader,
    DatasetError,
    GPTDataset,
    IndexedDataset,
    IndexedDatasetWriter,
    _index,
    make_loader,
)
from megatron_lite.data.blend import blend_index
from megatron_lite.data.sample_index import epoch_order

from .conftest import MakePrefix


class Numbered:
    """Sample i is i*10, i*10 + 1, …: six tokens."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fail_at = -1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> np.ndarray:
        if sample == self.fail_at:
            raise OSError("the disk went away")
        if not 0 <= sample < self.size:
            raise IndexError(sample)
        return np.arange(6) + sample * 10

    def batch(self, samples: Sequence[int] | range) -> np.ndarray:
        return np.stack([self[sample] for sample in samples])


class Fixed:
    def __init__(self, row: list[int]) -> None:
        self.row = np.array(row)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.row

    def batch(self, samples: Sequence[int] | range) -> np.ndarray:
        return np.stack([self.row] * len(samples))


def numbers(loader: DataLoader, steps: int) -> list[list[list[int]]]:
    """Sample numbers of each micro-batch of each step."""
    return [[(b.tokens[:, 0] // 10).tolist() for b in loader.next_step()] for _ in range(steps)]


@pytest.mark.parametrize("flag", [None, "eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_a_loader_of_a_configuration(flag: str | None) -> None:
    tree = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 5},
        "data": {"tokenizer": "byte"} | ({flag: True} if flag else {}),
        "train": {"micro_batch_size": 2, "global_batch_size": 8, "steps": 1, "output_dir": "out"},
        "optimizer": {"lr": 0.001},
    }
    config = build_config(tree).with_vocab_size(160)
    loader = make_loader(config, Numbered(24), 102, 1, 2, consumed_samples=8)
    batch, second = loader.next_step()
    assert [batch.tokens[0, 0], second.tokens[0, 0]] == [100, 140], "samples 10 and 14"
    assert (loader.consumed_samples, loader.remaining_steps) == (16, 1)
    assert (batch.loss_mask == 0).any() == (flag == "eod_mask_loss")
    assert (batch.position_ids is not None) == (flag == "reset_position_ids")
    assert (batch.segments is not None) == (flag == "reset_attention_mask")
    with pytest.raises(DatasetError, match="another tokenizer"):
        loader.next_step()  # sample 18 holds 180


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_micro_batches_are_dealt_to_the_ranks_in_turn(num_workers: int) -> None:
    data = Numbered(24)
    ranks = [DataLoader(data, 2, 12, rank, 3, num_workers=num_workers) for rank in range(3)]
    assert numbers(ranks[0], 2) == [[[0, 1], [6, 7]], [[12, 13], [18, 19]]]
    assert numbers(ranks[1], 2) == [[[2, 3], [8, 9]], [[14, 15], [20, 21]]]
    assert numbers(ranks[2], 2) == [[[4, 5], [10, 11]], [[16, 17], [22, 23]]]
    for rank in ranks:
        assert rank.consumed_samples == 24
        rank.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_global_batch_is_the_same_for_any_number_of_ranks(size: int) -> None:
    loaders = [DataLoader(Numbered(40), 2, 8, rank, size, consumed_samples=8) for rank in range(size)]
    for step in range(1, 4):
        read = sorted(n for loader in loaders for batch in numbers(loader, 1)[0] for n in batch)
        assert read == list(range(step * 8, step * 8 + 8))
    for loader in loaders:
        loader.close()


def test_inputs_and_labels_are_one_apart() -> None:
    loader = DataLoader(Numbered(4), 2, 2, num_workers=0)
    (batch,) = loader.next_step()
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert batch.labels.tolist() == [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]]
    assert (batch.loss_mask == 1).all() and batch.position_ids is None and batch.segments is None
    assert [a.dtype for a in batch[:3]] == [np.int64, np.int64, np.float32]
    assert batch.tokens.flags.c_contiguous and batch.labels.flags.c_contiguous


def test_resume_goes_on_where_it_stopped_with_other_sizes() -> None:
    first = DataLoader(Numbered(100), 2, 4)
    before = numbers(first, 5)
    position = first.consumed_samples
    first.close()
    assert before[-1] == [[16, 17], [18, 19]] and position == 20, "reading ahead does not count"
    second = [DataLoader(Numbered(100), 1, 6, rank, 2, consumed_samples=position) for rank in range(2)]
    assert numbers(second[0], 1) == [[[20], [22], [24]]]
    assert numbers(second[1], 1) == [[[21], [23], [25]]]
    for loader in second:
        loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_end_is_an_error_before_the_step(num_workers: int) -> None:
    loader = DataLoader(Numbered(11), 1, 4, num_workers=num_workers)
    assert loader.remaining_steps == 2
    loader.next_step()
    loader.next_step()
    assert loader.remaining_steps == 0
    with pytest.raises(DatasetError, match="ends at sample 11: a global batch of 4 from sample 8"):
        loader.next_step()
    assert loader.consumed_samples == 8
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_reading_surfaces_at_its_step(num_workers: int) -> None:
    data = Numbered(40)
    data.fail_at = 6
    loader = DataLoader(data, 1, 4, num_workers=num_workers)
    loader.next_step()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk went away"):
            loader.next_step()
    assert loader.consumed_samples == 4
    data.fail_at = -1
    assert numbers(loader, 1) == [[[4], [5], [6], [7]]], "once it can be read, nothing is lost"
    loader.close()


def test_documents_within_a_row() -> None:
    """eod is 9; it belongs to the document it ends."""
    flags = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    loader = DataLoader(Fixed([1, 9, 2, 3, 9, 9, 4, 9]), 1, 2, eod_id=9, num_workers=0, **flags)  # type: ignore[arg-type]
    batch = loader.next_step()[0]
    assert batch.tokens.tolist() == [[1, 9, 2, 3, 9, 9, 4]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1, 0, 0, 1]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 0]]
    assert batch.segments is not None and batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert batch.position_ids.dtype == np.int64 and batch.segments.dtype == np.int32


@pytest.mark.parametrize("flag", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_each_flag_acts_alone_and_needs_an_eod(flag: str) -> None:
    batch = DataLoader(Fixed([1, 9, 2]), 1, 1, eod_id=9, num_workers=0, **{flag: True}).next_step()[0]
    assert (batch.loss_mask == 0).any() == (flag == "eod_mask_loss")
    assert (batch.position_ids is not None) == (flag == "reset_position_ids")
    assert (batch.segments is not None) == (flag == "reset_attention_mask")
    with pytest.raises(ValueError, match="end-of-document"):
        DataLoader(Fixed([1, 9, 2]), 1, 1, **{flag: True})


def test_ids_of_another_tokenizer_are_named() -> None:
    loader = DataLoader(Fixed([1, 2, 57]), 1, 1, vocab_size=57, num_workers=0)
    with pytest.raises(DatasetError, match="another tokenizer"):
        loader.next_step()
    DataLoader(Fixed([1, 2, 57]), 1, 1, vocab_size=58, num_workers=0).next_step()


@pytest.mark.parametrize(
    ("ids", "fits"), [([0, 5, 9], True), ([0, 5, 10], False), ([0, -1, 9], False), ([0, 5, -1], False)]
)
def test_ids_are_checked_where_they_are_read_in_one_call(
    make_prefix: MakePrefix, ids: list[int], fits: bool
) -> None:
    """Of two inputs and a label: the last id is only ever a label."""
    dataset = GPTDataset(IndexedDataset(make_prefix([3], tokens=np.array(ids))), range(1), None, 2, seed=1)
    loader = DataLoader(dataset, 1, 1, vocab_size=10, num_workers=0)
    if fits:
        assert loader.next_step()[0].labels.tolist() == [ids[1:]]
    else:
        with pytest.raises(DatasetError, match=f"token ids from {min(ids)} to {max(ids)} in samples 0 to 1"):
            loader.next_step()


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        DataLoader(Numbered(9), 2, 6, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        DataLoader(Numbered(9), 1, 2, 2, 2)


def restarted_positions(ends: np.ndarray) -> np.ndarray:
    """[b, S] positions that start again at 0 after each True of `ends` [b, S]."""
    positions = np.arange(ends.shape[1], dtype=np.int64)
    starts = np.zeros(ends.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], positions[1:], 0)
    return positions - np.maximum.accumulate(starts, axis=1)


def segment_numbers(ends: np.ndarray) -> np.ndarray:
    """[b, S] numbers 0, 1, … that go up after each True of `ends` [b, S]."""
    segments = np.zeros(ends.shape, dtype=np.int32)
    np.cumsum(ends[:, :-1], axis=1, out=segments[:, 1:])
    return segments


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_marks_are_those_of_numpy(share: float) -> None:
    random = np.random.default_rng(3)
    tokens = np.where(random.random((7, 33)) < share, 9, random.integers(10, 50, (7, 33)))
    mask, positions = np.full((7, 33), 5, np.float32), np.full((7, 33), 5, np.int64)
    segments = np.full((7, 33), 5, np.int32)
    _index.mark_documents(tokens, mask, positions, segments, eod=9, mask_loss=True)
    np.testing.assert_array_equal(mask, (tokens != 9).astype(np.float32))
    np.testing.assert_array_equal(positions, restarted_positions(tokens == 9))
    np.testing.assert_array_equal(segments, segment_numbers(tokens == 9))


class InPython:
    """A dataset without its reader, as any other that reads in Python."""

    def __init__(self, dataset: GPTDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.dataset[sample]

    def batch(self, samples: Sequence[int] | range) -> np.ndarray:
        return np.stack([self[sample] for sample in samples])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_reading_in_one_call_is_reading_in_python(make_prefix: MakePrefix, dtype: type) -> None:
    """Blends, every type of ids, lengths that no instruction set's width divides, all marks."""
    random = np.random.default_rng(5)
    native, python = [], []
    for name in ("a", "b", "c"):
        lengths = random.integers(0, 60, 50)
        with IndexedDatasetWriter(make_prefix([1], name), dtype) as writer:
            for length in lengths:
                writer.add_sequence(random.integers(0, 100, length).astype(dtype))
                writer.end_document()
        indexed = IndexedDataset(writer.prefix)
        dataset = GPTDataset(indexed, range(len(indexed)), 60, 37, seed=1)
        order = epoch_order(dataset.tokens, 60, 37)
        for sample, (position, offset) in enumerate(order["starts"].tolist()):
            documents = order["documents"][position : position + 60]
            joined = np.concatenate([indexed[number] for number in documents])
            np.testing.assert_array_equal(dataset[sample], joined[offset : offset + 38])
        native.append(dataset)
        python.append(InPython(dataset))
    index = blend_index([0.5, 0.2, 0.3], 60)
    flags = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    loaders = [
        DataLoader(BlendedDataset(members, index), 2, 12, 1, 3, eod_id=7, vocab_size=100, **flags)  # type: ignore[arg-type]
        for members in (native, python, [native[0], python[1], native[2]])
    ]
    for _ in range(5):
        for ours, *others in zip(*(loader.next_step() for loader in loaders), strict=True):
            for other in others:
                for one, another in zip(ours, other, strict=True):
                    np.testing.assert_array_equal(one, another)
                    assert one is not None and one.flags.c_contiguous and one.flags.aligned
    for loader in loaders:
        loader.close()


def test_a_batch_that_is_kept_keeps_its_tokens(make_prefix: MakePrefix) -> None:
    """Memory is used again once a batch is gone, and not before."""
    dataset = GPTDataset(IndexedDataset(make_prefix([500])), range(1), 60, 8, seed=1)
    loader = DataLoader(dataset, 2, 4, num_workers=0)
    kept = [loader.next_step()[1].labels[:1] for _ in range(5)]
    copies = [labels.copy() for labels in kept]
    places = set()
    for _ in range(8):
        batch = loader.next_step()[0]
        places.add(batch.tokens.ctypes.data)
        del batch
        gc.collect()
    assert len(places) <= 2
    for labels, copied in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(labels, copied)


def test_a_dataset_may_begin_within_the_run() -> None:
    loader = DataLoader(Numbered(12), 1, 4, consumed_samples=104, first_sample=100)
    assert loader.remaining_steps == 2
    assert numbers(loader, 2) == [[[4], [5], [6], [7]], [[8], [9], [10], [11]]]
    with pytest.raises(DatasetError, match="ends at sample 112: a global batch of 4 from sample 112"):
        loader.next_step()
    loader.close()


def test_an_index_that_points_outside_is_an_error(make_prefix: MakePrefix) -> None:
    """A damaged cache that its checksums do not show must not read other memory."""
    indexed = IndexedDataset(make_prefix([9, 9]))
    spans = np.zeros((0, 2), np.int32)

    def read(
        documents: list[int], starts: list[list[int]], spans: np.ndarray = spans, packed: bool = False
    ) -> None:
        arrays = (np.array(documents, np.int32), spans, np.array(starts, np.int32))
        reader = _index.IndexedSamples(
            *(indexed.tokens, indexed.offsets, indexed.lengths, *arrays), length=4, packed=packed, first=0
        )
        tokens, labels = np.empty((1, 4), np.int64), np.empty((1, 4), np.int64)
        reader.read(np.array([0]), tokens, labels)

    read([0, 1], [[0, 7]])
    for documents, starts in (
        ([0, 2], [[0, 7]]),
        ([0, -1], [[0, 7]]),
        ([0, 1], [[1, 6]]),
        ([0, 1], [[-1, 0]]),
    ):
        with pytest.raises(IndexError):
            read(documents, starts)
    with pytest.raises(IndexError):
        read([0, 1], [[0, -1]])
    far = np.array([[0, 40]], np.int32)
    for packed in (False, True):
        with pytest.raises(IndexError):
            read([1], [[0, 1 if packed else 36]], far, packed)
    with pytest.raises(IndexError, match="longer than a sample"):
        read([0, 1], [[0, 2]], np.array([[0, 3], [0, 3]], np.int32), True)
    with pytest.raises(ValueError, match=r"\[samples, length\]"):
        _index.IndexedSamples(
            *(indexed.tokens, indexed.offsets, indexed.lengths, np.zeros(1, np.int32), spans, spans),
            length=4,
            packed=False,
            first=0,
        ).read(np.array([0]), np.empty((1, 5), np.int64), np.empty((1, 5), np.int64))
