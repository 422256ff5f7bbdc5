from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data import DatasetError, IndexedDataset, IndexedDatasetWriter, statistics, write_sidecar
from megatron_lite.data.sidecar import Checksums, Sidecar
from megatron_lite.data.statistics import (
    Bin,
    Ids,
    Lengths,
    check_ids,
    check_sidecar,
    document_lengths,
    draw,
    histogram,
    ids_in_use,
)


def dataset(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    return IndexedDataset(prefix)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_lengths_are_those_of_documents(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_DOCUMENTS", block)
    indexed = dataset(tmp_path / "x", [[], [[1], [2, 3]], [[4]], [], [[5, 6, 7]], []])
    assert indexed.document_lengths(0, 6).tolist() == [0, 3, 1, 0, 3, 0]
    lengths = document_lengths(indexed)
    assert lengths.values.tolist() == [0, 1, 3] and lengths.counts.tolist() == [3, 1, 2]
    assert histogram(lengths) == [Bin(0, 0, 3), Bin(1, 1, 1), Bin(2, 3, 2)]
    empty = document_lengths(dataset(tmp_path / "y", []))
    assert empty.documents == 0 and histogram(empty) == [] and draw([]) == []
    assert document_lengths(dataset(tmp_path / "z", [[], []])).values.tolist() == [0]


@given(st.lists(st.integers(0, 50), min_size=1), st.lists(st.floats(0, 100), min_size=1))
def test_percentiles_are_numpys(values: list[int], shares: list[float]) -> None:
    lengths = Lengths(*np.unique(np.array(values, np.int64), return_counts=True))
    expected = np.percentile(values, shares, method="inverted_cdf")
    assert lengths.percentiles(shares) == expected.tolist()


def test_the_histogram_is_drawn() -> None:
    assert draw([Bin(512, 1023, 1), Bin(1024, 2047, 400), Bin(2048, 4095, 0)]) == [
        "  512 to 1,023    1  █",
        "1,024 to 2,047  400  " + "█" * 40,
        "2,048 to 4,095    0  ",
    ]


@pytest.mark.parametrize("block", [1, 3, 100])
def test_ids_are_counted(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_IDS", block)
    indexed = dataset(tmp_path / "x", [[[5, 1, 5, 9]], [[1, 5, 7]]])
    assert ids_in_use(indexed, 3) == Ids(1, 9, [(5, 3), (1, 2), (7, 1)])
    assert ids_in_use(indexed, 30) == Ids(1, 9, [(5, 3), (1, 2), (7, 1), (9, 1)])
    assert ids_in_use(dataset(tmp_path / "y", [[]]), 3) is None
    assert ids_in_use(dataset(tmp_path / "z", [[[3, 2**30, -1]]], "int32"), 3) == Ids(-1, 2**30, [])


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    indexed = dataset(tmp_path / "x", [[[5, 9]]])
    check_ids(indexed, Ids(0, 9, []), 10)
    check_ids(indexed, Ids(0, 9, []), None)
    check_ids(indexed, None, 10)
    with pytest.raises(DatasetError, match=r"x\.bin: ids from 0 to 9, where a vocabulary has 0 to 8"):
        check_ids(indexed, Ids(0, 9, []), 9)
    with pytest.raises(DatasetError, match="ids from -1 to 9, where a vocabulary has 0 and more"):
        check_ids(indexed, Ids(-1, 9, []), None)


def test_checksums_are_compared_when_asked(tmp_path: Path) -> None:
    prefix = str(tmp_path / "x")
    indexed = dataset(tmp_path / "x", [[[5, 9]], [[7]]])
    assert check_sidecar(prefix, True) is None
    counts = (indexed.num_documents, len(indexed), indexed.num_tokens)
    sidecar = Sidecar("byte", "f", 257, 256, False, "plain", "uint16", *counts, Checksums.of_files(prefix))
    write_sidecar(prefix, sidecar)
    assert check_sidecar(prefix, True) == check_sidecar(prefix, True, "f") == sidecar
    with pytest.raises(DatasetError, match="made with another tokenizer"):
        check_sidecar(prefix, False, "g")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "x.bin").write_bytes(data)
    assert check_sidecar(prefix, False) == sidecar
    with pytest.raises(DatasetError, match=r"x\.bin: its checksum is [0-9a-f]{8}, .*x\.json says"):
        check_sidecar(prefix, True)
