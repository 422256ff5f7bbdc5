import bisect
import logging
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config import DataConfig
from megatron_lite.data import DataLoader, GPTDataset, IndexedDataset, _index, build_datasets
from megatron_lite.data.rest import Taken
from megatron_lite.data.sample_index import NO_SPANS, Tokens, packed_order

from .conftest import MakePrefix

EOD = 10**6


def best_fit(lengths: list[int], documents: list[int], capacity: int) -> list[list[tuple[int, int, int]]]:
    """Best-fit-decreasing in plain Python: rows of (document, first token, end)."""
    pieces = [
        (document, begin, min(begin + capacity, lengths[document]))
        for document in documents
        for begin in range(0, lengths[document], capacity)
    ]
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for number in sorted(range(len(pieces)), key=lambda n: pieces[n][1] - pieces[n][2]):
        length = pieces[number][2] - pieces[number][1]
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(number)
        if room > length:
            bisect.insort(rooms, (room - length, row))
    return [[pieces[number] for number in sorted(row)] for row in rows]


def rows_of(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[list[tuple[int, int, int]]]:
    documents, spans, starts = (array.tolist() for array in arrays)
    return [[(documents[at], *spans[at]) for at in range(first, first + count)] for first, count in starts]


@pytest.mark.parametrize("number", range(30))
def test_rows_are_those_of_best_fit_decreasing(number: int) -> None:
    """Among rows of the same room any may be taken, so what must agree is how full the rows are."""
    random = np.random.default_rng(number)
    lengths = random.integers(0, random.integers(2, 120), random.integers(1, 200)).tolist()
    documents = random.permutation(len(lengths)).tolist()
    capacity = int(random.choice([1, 7, 32, 64, 65, 5000]))
    made = rows_of(
        _index.pack(np.array(lengths, np.int32), np.array(documents, np.int32), NO_SPANS, capacity)
    )
    expected = best_fit(lengths, documents, capacity)

    def fill(rows: list[list[tuple[int, int, int]]]) -> list[int]:
        return sorted(sum(end - begin for _, begin, end in row) for row in rows)

    assert fill(made) == fill(expected)
    assert sorted(piece for row in made for piece in row) == sorted(p for row in expected for p in row)
    places = {document: place for place, document in enumerate(documents)}
    for row in made:
        assert [places[piece[0]] for piece in row] == sorted(places[piece[0]] for piece in row)


def test_long_documents_of_many_lengths_and_a_large_capacity() -> None:
    """The search over rooms goes through both levels of its bit set."""
    random = np.random.default_rng(1)
    lengths = (random.pareto(0.7, 3000) * 50 + 1).astype(np.int32) % 40_000 + 1
    documents = np.arange(3000, dtype=np.int32)
    made = rows_of(_index.pack(lengths, documents, NO_SPANS, 30_000))
    expected = best_fit(lengths.tolist(), documents.tolist(), 30_000)
    assert sorted(sum(e - b for _, b, e in row) for row in made) == sorted(
        sum(e - b for _, b, e in row) for row in expected
    )


def test_each_epoch_has_every_document_once_whole_where_it_fits(make_prefix: MakePrefix) -> None:
    lengths = [3, 17, 8, 5, 5, 2, 30, 1, 9]
    tokens = Tokens(np.array(lengths, np.int32), range(9), 4)
    rows = len(packed_order(tokens, None, 10)["starts"])
    order = packed_order(tokens, 3 * rows, 10)
    made = rows_of((order["documents"], order["spans"], order["starts"]))
    epochs = [made[e * rows : (e + 1) * rows] for e in range(3)]
    whole = sorted(
        (d, b, min(b + 10, length)) for d, length in enumerate(lengths) for b in range(0, length, 10)
    )
    assert [sorted(piece for row in epoch for piece in row) for epoch in epochs] == [whole] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    shorter = packed_order(tokens, rows + 2, 10)
    assert rows_of((shorter["documents"], shorter["spans"], shorter["starts"])) == made[: rows + 2]
    assert len(packed_order(tokens, 0, 10)["starts"]) == 0


def test_a_row_of_the_loader(make_prefix: MakePrefix) -> None:
    """Documents of 12, 5 and 4 tokens in rows of 8: 8; 5; 4 + 4."""
    indexed = IndexedDataset(make_prefix([12, 5, 4]))
    dataset = GPTDataset(indexed, range(3), None, 8, 1, packing="best_fit")
    flags = {"reset_position_ids": True, "reset_attention_mask": True}
    loader = DataLoader(dataset, 3, 3, eod_id=EOD, num_workers=0, **flags)  # type: ignore[arg-type]
    (batch,) = loader.next_step()
    assert batch.position_ids is not None and batch.segments is not None
    rows = {}
    for row in range(3):
        parts = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.segments)
        rows[int(batch.tokens[row].max())] = [part[row].tolist() for part in parts]
    assert rows[7] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, 4, 5, 6, 7, 8],  # the document goes on in another row
        [1] * 8,
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0] * 8,
    ]
    assert rows[16] == [
        [12, 13, 14, 15, 16, 0, 0, 0],
        [13, 14, 15, 16, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 0, 0, 0, 0, -1, -1, -1],
    ]
    # The pieces of a row are in the order of the documents, which is random.
    first, second = sorted(zip(*(np.array(part).reshape(2, 4).tolist() for part in rows[20]), strict=True))
    assert first[:4] == ([8, 9, 10, 11], [9, 10, 11, 0], [1, 1, 1, 0], [0, 1, 2, 3])
    assert second[:4] == ([17, 18, 19, 20], [18, 19, 20, 0], [1, 1, 1, 0], [0, 1, 2, 3])
    assert {tuple(first[4]), tuple(second[4])} == {(0,) * 4, (1,) * 4}
    assert dataset[0].shape == (9,)


def test_eod_is_masked_where_asked_for(make_prefix: MakePrefix) -> None:
    """As an input within a row, though with packing it ends a document in any case."""
    indexed = IndexedDataset(make_prefix([4, 4]))
    dataset = GPTDataset(indexed, range(2), None, 4, 1, packing="best_fit")
    (batch,) = DataLoader(dataset, 2, 2, eod_id=1, eod_mask_loss=True, num_workers=0).next_step()
    assert sorted(batch.loss_mask.tolist()) == [[1, 0, 1, 0], [1, 1, 1, 0]]


def test_what_it_saves_is_said(
    make_prefix: MakePrefix, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Joined, 4 documents of 6 tokens lie over 3 rows of 8, so that 2 are cut; packed, a row has room for one."""
    config = DataConfig(train=make_prefix([6, 6, 6, 6]), split="1", packing="best_fit")
    for _ in range(2):  # also where the index is found again
        caplog.clear()
        with caplog.at_level(logging.INFO):
            build_datasets(config, 8, 1, 7)
        assert (
            "of 4 documents of an epoch packing cuts 0 (joined end to end: 2) and pads 25.00%" in caplog.text
        )
    caplog.clear()
    indexed = IndexedDataset(make_prefix([6, 6, 6, 6]))
    with caplog.at_level(logging.INFO):
        GPTDataset(indexed, range(4), None, 8, 1, packing="best_fit", history=[Taken(4, "concat", 2)])
    assert "of 3 pieces of what is left of the epoch packing cuts 0 (" in caplog.text


@pytest.mark.parametrize("number", range(20))
def test_documents_cut_where_they_are_joined(number: int) -> None:
    random = np.random.default_rng(number)
    lengths = random.integers(0, 30, 40).astype(np.int32)
    order = random.permutation(40).astype(np.int32)
    length = int(random.integers(1, 25))
    ends = np.cumsum(lengths[order])
    begins = ends - lengths[order]
    joined = ((ends - 1) // length != begins // length) & (lengths[order] > 0)
    assert _index.count_cut(lengths, order, NO_SPANS, length) == (joined.sum(), (lengths > length).sum())
