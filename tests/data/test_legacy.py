import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import DatasetError, IndexedDataset
from megatron_lite.data.legacy import open_tokens
from megatron_lite.data.merge import merge_datasets

SEQUENCES = [[1, 2, 3], [4], [], [5, 6]]
BOUNDS = [0, 2, 2, 4]


def write_tntidx(prefix: Path, code: int = 4, dtype: str = "<i4", bounds: list[int] = BOUNDS) -> None:
    """As Megatron-LM's IndexedDatasetBuilder wrote it."""
    ids = np.concatenate([np.array(sequence, dtype) for sequence in SEQUENCES])
    lengths = [len(sequence) for sequence in SEQUENCES]
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    numbers = [*range(len(lengths) + 1), *np.cumsum([0, *lengths]), *lengths, *bounds]
    header = struct.pack(
        "<8s6Q", b"TNTIDX\0\0", 1, code, np.dtype(dtype).itemsize, len(lengths), len(lengths), len(bounds)
    )
    prefix.with_suffix(".idx").write_bytes(header + struct.pack(f"<{len(numbers)}q", *numbers))


def write_datatrove(path: Path, dtype: str = "<u2", metadata: str | None = "gpt2|{size}\n6\n6 T") -> None:
    """As datatrove's TokenizedFile writes it."""
    path.write_bytes(np.concatenate([np.array(sequence, dtype) for sequence in SEQUENCES]).tobytes())
    Path(f"{path}.index").write_bytes(struct.pack("<4Q", 3, 4, 4, 6))
    if metadata is not None:
        Path(f"{path}.metadata").write_text(metadata.format(size=np.dtype(dtype).itemsize))


def check(dataset: IndexedDataset, dtype: str, bounds: list[int]) -> None:
    assert [sequence.tolist() for sequence in dataset] == SEQUENCES
    assert dataset.dtype == np.dtype(dtype) and dataset.document_bounds.tolist() == bounds


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_tntidx_is_converted(tmp_path: Path, code: int, dtype: str) -> None:
    write_tntidx(tmp_path / "old", code, dtype)
    with pytest.raises(DatasetError, match=r"TNTIDX\), which tools/merge_datasets.py converts"):
        IndexedDataset(tmp_path / "old")
    merge_datasets([tmp_path / "old"], tmp_path / "new")
    check(IndexedDataset(tmp_path / "new"), dtype, BOUNDS)
    merged = merge_datasets([tmp_path / "old", tmp_path / "new"], tmp_path / "both", documents_per_part=5)
    assert [part.documents for part in merged] == [5, 1] and [part.tokens for part in merged] == [10, 2]


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (8, 2, "version 2"),
        (16, 6, "dtype code 6 of 4 bytes"),
        (24, 8, "dtype code 4 of 8 bytes"),
        (32, 5, "its header describes"),
        (32, 2**63, "its header describes"),
        (40, 2**40, "its header describes"),
        (56 + 8, 0, "several dimensions"),
        (56 + 40, 1, "disagree|the first offset"),
        (56 + 40 + 8, 9, "lengths and offsets near sequence 0"),
        (56 + 80, -3, "lengths and offsets near sequence 0"),
        (56 + 80 + 32, 1, "do not span"),
        (56 + 80 + 32 + 24, 3, "do not span the 4 sequences .old versions of Megatron's merge"),
        (56 + 80 + 32 + 8, 3, "go backwards"),
    ],
)
def test_damaged_tntidx_is_refused(tmp_path: Path, position: int, value: int, reason: str) -> None:
    write_tntidx(tmp_path / "old")
    data = bytearray((tmp_path / "old.idx").read_bytes())
    data[position : position + 8] = struct.pack("<Q", value % 2**64)
    (tmp_path / "old.idx").write_bytes(data)
    with pytest.raises(DatasetError, match=reason):
        open_tokens(tmp_path / "old")


def test_offsets_that_begin_elsewhere_are_refused(tmp_path: Path) -> None:
    write_tntidx(tmp_path / "old")
    data = bytearray((tmp_path / "old.idx").read_bytes())
    data[56 + 40 : 56 + 80] = struct.pack("<5q", 1, 4, 5, 5, 7)
    (tmp_path / "old.idx").write_bytes(data)
    (tmp_path / "old.bin").write_bytes(bytes(4) + (tmp_path / "old.bin").read_bytes())
    with pytest.raises(DatasetError, match="the first offset is 1, not 0"):
        open_tokens(tmp_path / "old")


def test_tensors_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    write_tntidx(tmp_path / "old")
    data = (tmp_path / "old.bin").read_bytes()
    (tmp_path / "old.bin").write_bytes(data + b"\0")
    with pytest.raises(DatasetError, match="25 bytes, but its index describes 24"):
        open_tokens(tmp_path / "old")
    (tmp_path / "old.bin").unlink()
    with pytest.raises(DatasetError, match="cannot be read"):
        open_tokens(tmp_path / "old")
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\0\0")
    with pytest.raises(DatasetError, match="8 bytes, the header alone takes 56"):
        open_tokens(tmp_path / "old")
    (tmp_path / "old.idx").write_bytes(struct.pack("<8s6Q7q", b"TNTIDX\0\0", 1, 4, 4, 1, 2, 1, *range(7)))
    with pytest.raises(DatasetError, match="2 sizes of 1 entries"):
        open_tokens(tmp_path / "old")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("metadata", [None, "gpt2|{size}\n6\n6 T", "a|b/gpt2\n6\n6 T", "gpt2\n6"])
def test_datatrove_is_converted(tmp_path: Path, dtype: str, metadata: str | None) -> None:
    write_datatrove(tmp_path / "x.ds", dtype, metadata)
    merge_datasets([tmp_path / "x.ds"], tmp_path / "new")
    check(IndexedDataset(tmp_path / "new"), dtype.replace("u4", "i4"), [0, 1, 2, 3, 4])
    merged = merge_datasets([tmp_path / "*.ds", tmp_path / "new"], tmp_path / "both", documents_per_part=3)
    assert [part.tokens for part in merged] == [4, 6, 2]


def test_empty_files_are_empty_datasets(tmp_path: Path) -> None:
    (tmp_path / "x.ds").write_bytes(b"")
    (tmp_path / "x.ds.index").write_bytes(b"")
    merge_datasets([tmp_path / "x.ds"], tmp_path / "new")
    assert IndexedDataset(tmp_path / "new").num_documents == 0


def test_damaged_datatrove_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ds"
    index, metadata = Path(f"{path}.index"), Path(f"{path}.metadata")
    for what, reason in (
        (lambda: path.write_bytes(path.read_bytes() + b"\0\0"), "14 bytes, but its index describes 12"),
        (lambda: path.write_bytes(path.read_bytes() * 3), "36 bytes for 6 ids"),
        (lambda: path.unlink(), "cannot be read"),
        (lambda: index.write_bytes(struct.pack("<4Q", 3, 2, 4, 6)), "near 0 go backwards"),
        (lambda: index.write_bytes(struct.pack("<4Q", 3, 4, 4, 2**63)), "that is no index"),
        (lambda: index.write_bytes(struct.pack("<4Q", 3, 4, 4, 2**33)), "go backwards, or too far"),
        (lambda: index.write_bytes(index.read_bytes()[:-1]), "cut short"),
        (lambda: metadata.write_text("gpt2|4\n6"), "6 of 4 bytes"),
        (lambda: metadata.write_text("gpt2\n7"), "7 of None bytes"),
        (lambda: metadata.write_text("gpt2"), "not the metadata"),
    ):
        write_datatrove(path)
        what()
        with pytest.raises(DatasetError, match=reason):
            open_tokens(path)
    write_datatrove(path, "<u4")
    path.write_bytes(path.read_bytes()[:-1] + b"\x80")
    with pytest.raises(DatasetError, match="2\\^31 or more"):
        open_tokens(path)


def test_other_files_of_the_same_format_are_read_as_they_are(tmp_path: Path) -> None:
    """datatrove's MegatronTokenizedFile: a document a sequence."""
    lengths = [3, 1, 2]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 4) + struct.pack(
        "<3i3q4q", *lengths, 0, 6, 8, 0, 1, 2, 3
    )
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "x")] == [[0, 1, 2], [3], [4, 5]]
    merge_datasets([tmp_path / "x"], tmp_path / "y")
    assert (tmp_path / "y.idx").read_bytes() == index


@pytest.mark.parametrize("code", [6, 7])
def test_floats_are_refused_whoever_wrote_them(tmp_path: Path, code: int) -> None:
    (tmp_path / "x.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 0, 1) + bytes(8))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DatasetError, match=f"dtype code {code} is no type of token ids .float.* GPT-NeoX"):
        open_tokens(tmp_path / "x")


def test_multimodal_files_and_known_damage_are_refused(tmp_path: Path) -> None:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 2, 3)
    rest = struct.pack("<2i2q3q", 3, 1, 0, 12, 0, 1, 2)
    ids = np.arange(4, dtype="<i4").tobytes()
    wrapped = struct.pack("<2i2q3q", 2**30, 1, 0, 2**32, 0, 1, 2).replace(struct.pack("<q", 2**32), bytes(8))
    for index, data, reason in (
        (header + rest + b"\0\1", ids, "multimodal file"),
        (header + rest, ids + bytes(8), "as Megatron-DeepSpeed writes with --append-eod"),
        (header + wrapped, ids, "counted in 32 bits"),
        (header[:26] + struct.pack("<Q", 1) + rest[:-16], ids, "merges by old versions of Megatron"),
    ):
        (tmp_path / "x.idx").write_bytes(index)
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(DatasetError, match=reason):
            merge_datasets([tmp_path / "x"], tmp_path / "y")
