import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import DatasetError, IndexedDataset, IndexedDatasetWriter, token_dtype
from megatron_lite.data import indexed as indexed_module
from megatron_lite.data import writer as writer_module


def test_the_files_have_the_bytes_of_the_format(tmp_path: Path) -> None:
    """Spelt out by hand from the format: magic, version, dtype code, N, M, lengths, offsets, bounds."""
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([])
        writer.add_sequence([258])
        writer.add_sequence([5, 6])
        writer.end_document()
    assert (tmp_path / "x.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 2, 1, 5, 0, 6, 0])
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 1, 3)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_what_was_written_is_read(tmp_path: Path, dtype: type) -> None:
    documents = [[1, 2, 3], [], [100], list(range(50))]
    with IndexedDatasetWriter(tmp_path / "x", dtype) as writer:
        for document in documents:
            writer.add_document(document)
    read = IndexedDataset(tmp_path / "x")
    assert read.dtype == dtype and read.num_tokens == 54 and len(read) == 3 and read.num_documents == 4
    assert [sequence.tolist() for sequence in read] == [d for d in documents if d]
    assert read.document_bounds.tolist() == [0, 1, 1, 2, 3]
    assert read[-1].tolist() == list(range(50)) and read.get(2, 3, 5).tolist() == [3, 4]
    assert read.get(0, 2, 9).tolist() == [3], "reading past a sequence's end stops there"
    with pytest.raises(IndexError):
        read[3]


def test_a_dataset_without_documents_can_be_written_and_opened(tmp_path: Path) -> None:
    IndexedDatasetWriter(tmp_path / "x", np.int32).close()
    assert len(IndexedDataset(tmp_path / "x")) == 0


def test_many_documents_at_once_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    documents = [[1, 2], [], [3], [4, 5, 6]]
    with IndexedDatasetWriter(tmp_path / "one", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    with IndexedDatasetWriter(tmp_path / "all", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3, 4, 5, 6]), [2, 0, 1, 3])
    for end in (".bin", ".idx"):
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"all{end}").read_bytes()


def test_offsets_are_right_across_the_borders_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    for chunk in (1, 2, 3, 4, 8, 100):
        monkeypatch.setattr(indexed_module, "_CHUNK", chunk)
        monkeypatch.setattr(writer_module, "_BLOCK", chunk)
        monkeypatch.setattr(writer_module, "_BUFFERED", chunk)
        with IndexedDatasetWriter(tmp_path / f"x{chunk}", np.int32) as writer:
            for length in lengths:
                writer.add_document(np.arange(length))
        assert IndexedDataset(tmp_path / f"x{chunk}").num_tokens == sum(lengths)
        assert (tmp_path / f"x{chunk}.idx").read_bytes() == (tmp_path / "x1.idx").read_bytes()


def test_dtype_follows_megatrons_threshold() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == token_dtype(None) == np.int32


@pytest.mark.parametrize("ids", [[1, 65536], [-1], np.array([70000])])
def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path, ids: list[int]) -> None:
    with (
        pytest.raises(DatasetError, match="do not fit uint16"),
        IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_leaves_the_old_pair(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([9])
        raise KeyboardInterrupt
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def _damage(path: Path, position: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)


# N = 3 sequences, M = 4 bounds: lengths at 34, offsets at 46, bounds at 70, end at 102.
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"X", "not an index"),
        (9, b"\x02", "version 2"),
        (17, b"\x09", "dtype code 9"),
        (17, b"\x07", "dtype code 7 is no type of token ids"),
        (17, b"\x04", "offsets near sequence 0 disagree"),
        (18, b"\x04", "102 bytes, its header describes 114"),
        (34, struct.pack("<i", -3), "lengths and offsets"),
        (38, struct.pack("<i", 2), "lengths and offsets"),
        (54, struct.pack("<q", 7), "lengths and offsets"),
        (70, struct.pack("<q", 1), "document bounds do not span"),
        (94, struct.pack("<q", 2), "document bounds do not span"),
        (78, struct.pack("<q", 3), "document bounds near document 0 go backwards"),
    ],
)
def test_a_damaged_index_is_reported(tmp_path: Path, position: int, value: bytes, message: str) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for document in ([1, 2, 3], [4], [5, 6]):
            writer.add_document(document)
    IndexedDataset(tmp_path / "x")
    _damage(tmp_path / "x.idx", position, value)
    with pytest.raises(DatasetError, match=message) as caught:
        IndexedDataset(tmp_path / "x")
    assert "x.idx" in str(caught.value) and "run tools/preprocess_data.py again" in str(caught.value)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_truncated_missing_and_empty_files_are_reported(tmp_path: Path, end: str) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    path = tmp_path / f"x{end}"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-2], content + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=rf"x\{end}"):
            IndexedDataset(tmp_path / "x")
    path.unlink()
    with pytest.raises(DatasetError, match="no such file"):
        IndexedDataset(tmp_path / "x")


def test_a_negative_length_is_reported_even_where_the_offsets_agree(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(8))
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ3i3q2q", 1, 1, 3, 2, 6, -2, 4, 0, 6, 4, 0, 3)
    )
    with pytest.raises(DatasetError, match="lengths and offsets"):
        IndexedDataset(tmp_path / "x")


def test_a_crash_between_the_two_files_never_pairs_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions have the same sizes, so that only the absence of the old index can tell."""
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3]), [2, 1])
    replace = os.replace

    def crash(source: Path, target: str) -> None:
        if target.endswith(".idx"):
            raise OSError("the machine went away")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    writer.add_documents(np.array([4, 5, 6]), [1, 2])
    with pytest.raises(OSError, match="went away"):
        writer.close()
    with pytest.raises(DatasetError, match=r"x\.idx: no such file"):
        IndexedDataset(tmp_path / "x")


def test_an_eod_left_out_of_the_lengths_is_named(tmp_path: Path) -> None:
    """Megatron-DeepSpeed's --append-eod: the token is in .bin, the lengths do not count it."""
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for document in ([1, 2, 3], [4], [5, 6]):
            writer.add_document(document)
    with open(tmp_path / "x.bin", "ab") as file:
        file.write(bytes(6))
    with pytest.raises(DatasetError, match="Megatron-DeepSpeed"):
        IndexedDataset(tmp_path / "x")


def test_a_multimodal_index_is_named(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    with open(tmp_path / "x.idx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(DatasetError, match="multimodal"):
        IndexedDataset(tmp_path / "x")
