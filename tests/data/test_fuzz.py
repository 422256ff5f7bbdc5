"""Damaged index files, whatever the damage: a DatasetError or the data, never a crash, never ids that are not there."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_lite.data import DatasetError, IndexedDataset
from megatron_lite.data.legacy import TokenFile, open_tokens
from megatron_lite.data.merge import merge_datasets

MMIDIDX = b"MMIDIDX\0\0"
TNTIDX = b"TNTIDX\0\0"
U64 = st.one_of(
    st.integers(0, 6),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
I64 = st.integers(-2, 8) | st.integers(-(2**63), 2**63 - 1)
I32 = st.integers(-2, 5) | st.integers(-(2**31), 2**31 - 1)


def mmididx(code: int, counts: tuple[int, int], lengths: list[int], longs: list[int]) -> bytes:
    header = struct.pack("<9sQBQQ", MMIDIDX, 1, code, *counts)
    return header + struct.pack(f"<{len(lengths)}i{len(longs)}q", *lengths, *longs)


def tntidx(fields: tuple[int, ...], longs: list[int]) -> bytes:
    return struct.pack(f"<8s6Q{len(longs)}q", TNTIDX, *fields, *longs)


@st.composite
def whole_but(draw: st.DrawFn, whole: bytes) -> bytes:
    """A good file with a few bytes or numbers written over, cut or lengthened."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(data) - 1))
        value = draw(st.one_of(st.binary(min_size=1, max_size=2), U64.map(lambda n: struct.pack("<Q", n))))
        data[position : position + len(value)] = value
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))]) + draw(
        st.just(b"") | st.binary()
    )


LENGTHS = [2, 0, 3]
GOOD = mmididx(8, (3, 4), LENGTHS, [0, 4, 4, 0, 1, 1, 3])
OLD = tntidx((1, 8, 2, 3, 3, 4), [0, 1, 2, 3, 0, 2, 2, 5, 2, 0, 3, 0, 1, 1, 3])
INDICES = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=80).map(lambda rest: MMIDIDX + rest),
    st.binary(max_size=80).map(lambda rest: TNTIDX + rest),
    st.builds(
        mmididx, st.integers(0, 9), st.tuples(U64, U64), st.lists(I32, max_size=4), st.lists(I64, max_size=9)
    ),
    # The header right for the size, so that the arrays are looked at.
    st.integers(0, 4).flatmap(
        lambda n: st.builds(
            mmididx,
            st.sampled_from([1, 2, 3, 4, 5, 8]),
            st.just((n, 3)),
            st.lists(I32, min_size=n, max_size=n),
            st.lists(I64, min_size=n + 3, max_size=n + 3),
        )
    ),
    st.builds(tntidx, st.tuples(*[U64] * 6), st.lists(I64, max_size=12)),
    st.integers(0, 3).flatmap(
        lambda n: st.builds(
            tntidx, st.just((1, 8, 2, n, n, 2)), st.lists(I64, min_size=3 * n + 4, max_size=3 * n + 4)
        )
    ),
    whole_but(GOOD),
    whole_but(OLD),
)


def check(found: TokenFile, data: bytes) -> None:
    """All that can be asked of a dataset that was taken for whole."""
    ids = np.frombuffer(data, found.dtype)
    lengths = np.asarray(found.lengths[:])
    bounds = np.asarray(found.document_bounds[:])
    assert found.num_tokens == len(ids) == lengths.sum() and (lengths >= 0).all()
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and (np.diff(bounds) >= 0).all()
    if isinstance(found, IndexedDataset):
        np.testing.assert_array_equal(np.concatenate([ids[:0], *found]), ids)
        assert found.document_lengths(0, found.num_documents).sum() == len(ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(INDICES, st.integers(0, 12))
@example(GOOD, 10)
@example(OLD, 10)
def test_any_index_is_whole_or_refused(folder: Path, index: bytes, size: int) -> None:
    (folder / "x.idx").write_bytes(index)
    (folder / "x.bin").write_bytes(bytes(range(size)))
    outcomes: list[Any] = []
    for opening in (IndexedDataset, open_tokens):
        try:
            found: TokenFile = opening(folder / "x")  # type: ignore[operator]
            check(found, bytes(range(size)))
            outcomes.append(found)
        except DatasetError as error:
            assert str(folder) in str(error)
            outcomes.append(None)
    taken = [found is not None for found in outcomes]
    assert taken[1] or not taken[0]
    if size == 10 and index in (GOOD, OLD):
        assert taken == [index == GOOD, True]
    if outcomes[1] is not None:
        merge_datasets([folder / "x"], folder / "y")
        check(IndexedDataset(folder / "y"), bytes(range(size)))


@given(st.lists(U64, max_size=5), st.binary(max_size=7), st.integers(0, 12), st.none() | st.text(max_size=20))
@example([1, 1, 4], b"", 8, "gpt2|2\n4")
def test_any_datatrove_index_is_whole_or_refused(
    folder: Path, ends: list[int], more: bytes, size: int, metadata: str | None
) -> None:
    path = folder / "x.ds"
    path.write_bytes(bytes(range(size)))
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends) + more)
    Path(f"{path}.metadata").unlink(missing_ok=True)
    if metadata is not None:
        Path(f"{path}.metadata").write_text(metadata, encoding="utf-8")
    try:
        check(open_tokens(path), bytes(range(size)))
    except DatasetError as error:
        assert ends != [1, 1, 4] or more or str(path) in str(error)
        assert (ends, more, size, metadata) != ([1, 1, 4], b"", 8, "gpt2|2\n4")
