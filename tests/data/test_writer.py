from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import DatasetError, IndexedDataset, IndexedDatasetWriter
from megatron_lite.data import writer as writer_module
from megatron_lite.data.sidecar import Checksums
from megatron_lite.data.writer import publish

SUFFIX = ".partial"
BATCHES = [([1, 2, 3], [2, 0, 1]), ([4, 5], [0, 2]), ([6, 7, 8, 9], [4]), ([], [0]), ([10], [1])]


def add(writer: IndexedDatasetWriter, batches: list[tuple[list[int], list[int]]]) -> None:
    for tokens, lengths in batches:
        writer.add_documents(np.array(tokens, dtype=np.int64), lengths)


def pair(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


@pytest.mark.parametrize("done", range(len(BATCHES) + 1))
def test_a_killed_writer_is_continued(tmp_path: Path, done: int) -> None:
    with IndexedDatasetWriter(tmp_path / "whole", np.uint16) as writer:
        add(writer, BATCHES)
    killed = IndexedDatasetWriter(tmp_path / "x", np.uint16, SUFFIX)
    add(killed, BATCHES[:done])
    state = killed.sync()
    add(killed, [*BATCHES[done:], ([7] * 9, [4, 5])])  # after the last sync: it may be on disk or not
    killed._flush()
    killed._close_files()
    with IndexedDatasetWriter(tmp_path / "x", np.uint16, SUFFIX, state) as writer:
        add(writer, BATCHES[done:])
    assert pair(tmp_path / "x") == pair(tmp_path / "whole")
    assert writer.checksums == Checksums.of_files(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x.bin", "x.idx"]


def test_unfinished_files_that_are_too_short_are_not_continued(tmp_path: Path) -> None:
    killed = IndexedDatasetWriter(tmp_path / "x", np.uint16, SUFFIX)
    add(killed, BATCHES)
    state = killed.sync()
    killed._close_files()
    path = tmp_path / "x.bin.partial"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="19 bytes, and 20 of it are written"):
        IndexedDatasetWriter(tmp_path / "x", np.uint16, SUFFIX, state)
    path.unlink()
    with pytest.raises(DatasetError, match="no such file"):
        IndexedDatasetWriter(tmp_path / "x", np.uint16, SUFFIX, state)


def test_finished_files_are_put_in_place_from_any_moment_of_a_crash(tmp_path: Path) -> None:
    for moment in range(3):
        prefix = tmp_path / str(moment)
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document([9, 9])
        writer = IndexedDatasetWriter(prefix, np.uint16, SUFFIX)
        add(writer, BATCHES)
        writer.finish()
        for end in (".bin", ".idx")[:moment]:
            Path(f"{prefix}{end}{SUFFIX}").replace(f"{prefix}{end}")
        for _ in range(2):
            publish(str(prefix), SUFFIX)
            assert IndexedDataset(prefix).num_tokens == 10
        assert not list(tmp_path.glob("*.partial"))


def test_documents_of_several_sequences_at_once(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents(np.arange(6), [1, 2, 3], counts=[2, 0, 1])
    dataset = IndexedDataset(tmp_path / "x")
    assert [sequence.tolist() for sequence in dataset] == [[0], [1, 2], [3, 4, 5]]
    assert dataset.document_bounds.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("lengths", "counts"), [([1], None), ([2, 1], None), ([1, 1], [1]), ([0, 2], [1, 1]), ([3, -1], [1, 1])]
)
def test_numbers_that_do_not_add_up_are_refused(
    tmp_path: Path, lengths: list[int], counts: list[int] | None
) -> None:
    with (
        pytest.raises(ValueError, match="add up"),
        IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add_documents(np.array([1, 2]), lengths, counts)


def test_a_sequence_longer_than_the_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_LONGEST", 3)
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        for add_too_long in (writer.add_document, lambda ids: writer.add_documents(np.array(ids), [4])):
            with pytest.raises(DatasetError, match="4 tokens"):
                add_too_long([1, 2, 3, 4])
    assert IndexedDataset(tmp_path / "x").num_tokens == 3
