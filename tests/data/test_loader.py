from collections.abc import Sequence

import numpy as np
import pytest

from megatron_lite.config import build_config
from megatron_lite.data import DataLoader, DatasetError, make_loader


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


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        DataLoader(Numbered(9), 2, 6, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        DataLoader(Numbered(9), 1, 2, 2, 2)
