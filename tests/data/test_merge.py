import importlib.util
import logging
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import DatasetError, IndexedDataset, IndexedDatasetWriter, read_sidecar, write_sidecar
from megatron_lite.data import merge as merge_module
from megatron_lite.data.merge import Merged, expand_prefixes, merge_datasets
from megatron_lite.data.sidecar import Checksums, Sidecar

Documents = list[list[list[int]]]  # of sequences of ids


def write(prefix: Path, documents: Documents, dtype: str = "uint16") -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    return prefix


def read(prefix: Path | str) -> Documents:
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_bounds
    return [
        [dataset[sequence].tolist() for sequence in range(bounds[d], bounds[d + 1])]
        for d in range(dataset.num_documents)
    ]


def files(prefix: Path | str) -> list[bytes]:
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


A: Documents = [[[1, 2, 3]], [], [[4], [5, 6]]]
B: Documents = [[], [[7, 8]], []]
C: Documents = [[[9] * 5], [[10]]]

DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=4), max_size=3), max_size=5
)


@settings(max_examples=20)
@given(st.lists(DOCUMENTS, min_size=1, max_size=4), st.integers(1, 7), st.booleans())
def test_merging_and_splitting_keep_every_document(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Documents], per_part: int, in_memory: bool
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [write(folder / f"in{n}", documents) for n, documents in enumerate(parts)]
    everything = [document for documents in parts for document in documents]
    write(folder / "expected", everything)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "_BLOCK", 2)
        patch.setattr(merge_module, "_COPY", 3)
        if in_memory:
            patch.delattr(os, "copy_file_range", raising=False)
        merge_datasets(prefixes, folder / "out")
        assert files(folder / "out") == files(folder / "expected")
        merged = merge_datasets(prefixes, folder / "s", documents_per_part=per_part)
    assert len(merged) == -(-len(everything) // per_part)
    assert [document for part in merged for document in read(part.prefix)] == everything
    assert all(part.documents == per_part for part in merged[:-1])


def test_what_the_system_cannot_copy_goes_through_memory_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sometimes(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) in (1, 3):
            raise OSError(18, "Invalid cross-device link")
        return copy_file_range(*arguments)

    calls: list[Any] = []
    copy_file_range = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", sometimes)
    merge_datasets([write(tmp_path / str(n), [[[n] * 3]]) for n in range(4)], tmp_path / "out")
    assert read(tmp_path / "out") == [[[n] * 3] for n in range(4)] and len(calls) >= 4


def test_counts_and_names(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / name, documents) for name, documents in (("a", A), ("b", B), ("c", C))]
    out = tmp_path / "new" / "out"
    assert merge_datasets(prefixes, out) == [Merged(str(out), 8, 6, 14)]
    assert read(out) == A + B + C and names(out.parent) == ["out.bin", "out.idx"]
    merged = merge_datasets([out], tmp_path / "part", shares=[Fraction(1), Fraction("2.5"), Fraction("0.5")])
    assert [Path(part.prefix).name for part in merged] == ["part_00000", "part_00001", "part_00002"]
    assert [part.documents for part in merged] == [2, 5, 1]
    assert [document for part in merged for document in read(part.prefix)] == A + B + C


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_the_files_are_those_of_megatron(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = [
        write(tmp_path / name, documents, dtype) for name, documents in (("a", A), ("b", B), ("c", C))
    ]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets(prefixes, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_inputs_are_taken_in_a_stated_order(tmp_path: Path) -> None:
    for name in ("x10", "x2", "sub/y", "d.ds"):
        write(tmp_path / name.removesuffix(".ds"), A)
    (tmp_path / "d.ds").write_bytes(b"")
    (tmp_path / "x2.json").write_text("{}")

    def found(*inputs: str) -> list[str]:
        prefixes = expand_prefixes([f"{tmp_path}/{entry}" for entry in inputs])
        return [Path(prefix).relative_to(tmp_path).as_posix() for prefix in prefixes]

    assert found("x2", "x10.idx", "x10.bin", "x2", "d.ds") == ["x2", "x10", "x10", "x2", "d.ds"]
    assert found("") == ["d", "d.ds", "x10", "x2"]
    assert found("sub", "x*", "**/*.idx") == ["sub/y", "x10", "x2", "d", "sub/y", "x10", "x2"]
    for nothing in ("*.none", "sub2*"):
        with pytest.raises(DatasetError, match="no dataset there"):
            found(nothing)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", A)
    write(tmp_path / "b", B, "int32")
    write(tmp_path / "c", C)
    before = names(tmp_path)
    for inputs, output, reason in (
        (["a", "b"], "out", "b: ids are int32, those of .*a uint16"),
        (["a", "none"], "out", "none.idx: no such file"),
        (["a", "c"], "c", "c: is an input and the output"),
    ):
        with pytest.raises(DatasetError, match=reason):
            merge_datasets([tmp_path / name for name in inputs], tmp_path / output)
    for shares, reason in (([1, 1000], "part 0 of the split gets none of the 3"), ([1, 0], "above 0")):
        with pytest.raises(DatasetError, match=reason):
            merge_datasets([tmp_path / "a"], tmp_path / "out", shares=list(map(Fraction, shares)))
    assert names(tmp_path) == before


def test_parts_of_an_earlier_split_do_not_mix_with_those_of_a_new_one(tmp_path: Path) -> None:
    write(tmp_path / "a", A)
    merge_datasets([tmp_path / "a"], tmp_path / "out", documents_per_part=1)
    merge_datasets([tmp_path / "a"], tmp_path / "out", documents_per_part=1)
    with pytest.raises(DatasetError, match="out_00002: part of an earlier split"):
        merge_datasets([tmp_path / "a"], tmp_path / "out", documents_per_part=2)


def test_nothing_is_left_when_a_part_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", A)
    write(tmp_path / "out_00000", C)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    written = []

    def fail(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return copy(*arguments)

    copy = merge_module._copy
    monkeypatch.setattr(merge_module, "_copy", fail)
    with pytest.raises(OSError, match="No space"):
        merge_datasets([tmp_path / "a"], tmp_path / "out", documents_per_part=1)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def sidecar(prefix: Path, **changes: Any) -> Sidecar:
    dataset = IndexedDataset(prefix)
    found = Sidecar(
        tokenizer="byte",
        fingerprint="f",
        vocab_size=257,
        eod_id=256,
        append_eod=True,
        special_tokens="plain",
        dtype=dataset.dtype.name,
        documents=dataset.num_documents,
        sequences=len(dataset),
        tokens=dataset.num_tokens,
        checksums=Checksums.of_files(prefix),
    )
    return replace(found, **changes)


def test_sidecars_are_carried_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefixes = [write(tmp_path / name, documents) for name, documents in (("a", A), ("b", B))]
    for prefix in prefixes:
        write_sidecar(prefix, sidecar(prefix))
    for part in merge_datasets(prefixes, tmp_path / "out", documents_per_part=4):
        assert read_sidecar(part.prefix) == sidecar(Path(part.prefix))
    (tmp_path / "a.json").unlink()
    with caplog.at_level(logging.WARNING):
        merge_datasets(prefixes, tmp_path / "out_00000")
    assert read_sidecar(tmp_path / "out_00000") is None and "a has no .json" in caplog.text


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"append_eod": False}, {"eod_id": None}])
def test_other_tokenizers_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    prefixes = [write(tmp_path / name, documents) for name, documents in (("a", A), ("b", B))]
    write_sidecar(prefixes[0], sidecar(prefixes[0]))
    write_sidecar(prefixes[1], sidecar(prefixes[1], **change))
    with pytest.raises(
        DatasetError, match=f"b: made with another tokenizer or other settings .*{next(iter(change))}"
    ):
        merge_datasets(prefixes, tmp_path / "out")
    assert not (tmp_path / "out.idx").exists()


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**31 - 1
    source: Any = type("Source", (), {})()
    source.lengths, source.document_bounds = np.full(4, most), np.arange(5)
    parts = [merge_module._Part(source, range(4), range(4), range(4 * most))] * 2
    index = b"".join(merge_module._index(np.dtype("<i4"), parts))
    offsets = np.frombuffer(index, "<i8", 8, 34 + 4 * 8)
    assert offsets.tolist() == [4 * most * n for n in range(8)]
    big: Any = type("Big", (), {"dtype": np.dtype("<i4"), "num_tokens": 2**61, "prefix": "x"})()
    with pytest.raises(DatasetError, match="the format holds"):
        merge_module._check_types([big])
