"""Token files of other and older programs, seen as today's datasets (tools/merge_datasets.py converts them).

* TNTIDX (PREFIX.bin, PREFIX.idx), Megatron-LM's and fairseq's "lazy" and "cached" datasets before MMIDIDX, all
  little-endian: magic, u64 version 1, u64 dtype code, u64 bytes per element, u64 sequences N, u64 sizes S, u64 length M
  of the document array, i64[N + 1] offsets into the sizes, i64[N + 1] offsets into .bin in elements, i64[S] sizes,
  i64[M] document bounds in sequence numbers.
* datatrove (FILE.ds, as nanotron reads it): the ids alone, FILE.ds.index u64 cumulative ends of the documents in ids,
  FILE.ds.metadata, lines of text: "tokenizer" or "tokenizer|bytes per id", the number of ids.
* GPT-NeoX and datatrove also write MMIDIDX; it is read as any other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import IndexedDataset, map_file

_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<8s6Q")
# 6 and 7 are floats. An id of type u4 (datatrove) is one of type i4 as long as it is below 2^31, which is checked.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_BLOCK = 1 << 20  # entries looked at once
_LONGEST = (1 << 31) - 1


class TokenFile(Protocol):
    """Documents of sequences of ids, back to back in one file: an `IndexedDataset`, or an older file.

    lengths: [N] tokens of each sequence; document_bounds: [M] as in `IndexedDataset`. Both may be sliced only.
    """

    @property
    def prefix(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def lengths(self) -> Any: ...
    @property
    def document_bounds(self) -> Any: ...
    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class _File:
    prefix: str
    path: Path
    dtype: np.dtype[Any]
    lengths: Any
    document_bounds: Any
    num_tokens: int


def open_tokens(name: str | os.PathLike[str]) -> TokenFile:
    """Today's dataset or an older one, checked against its index.

    name: the prefix of a .bin/.idx pair, or FILE.ds

    Raises DatasetError where files are missing, damaged, or of a kind that holds no text.
    """
    prefix = os.fspath(name)
    if prefix.endswith(".ds"):
        return _open_datatrove(prefix)
    index = map_file(Path(prefix + ".idx"))
    if bytes(index[: len(_MAGIC)]) == _MAGIC:
        return _open_tntidx(prefix, index)
    return IndexedDataset(prefix)


def _open_tntidx(prefix: str, index: NDArray[np.uint8]) -> TokenFile:
    path = f"{prefix}.idx"
    if index.size < _HEADER.size:
        raise DatasetError(f"{path}: {index.size} bytes, the header alone takes {_HEADER.size}")
    _, version, code, itemsize, sequences, sizes, bounds = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if version != 1:
        raise DatasetError(f"{path}: version {version} of TNTIDX, known is 1")
    if code not in _DTYPES or np.dtype(_DTYPES[code]).itemsize != itemsize:
        raise DatasetError(f"{path}: dtype code {code} of {itemsize} bytes is no type of token ids")
    expected = _HEADER.size + 8 * (2 * (sequences + 1) + sizes + bounds)
    if index.size != expected:
        raise DatasetError(f"{path}: {index.size:,} bytes, its header describes {expected:,}")
    if sizes != sequences:
        raise DatasetError(
            f"{path}: {sizes:,} sizes of {sequences:,} entries: not sequences of ids, but tensors"
        )
    starts = np.cumsum([_HEADER.size // 8, sequences + 1, sequences + 1, sizes, bounds])
    dims, offsets, lengths, documents = (index.view("<i8")[start:stop] for start, stop in pairwise(starts))
    if any((block != first + np.arange(len(block))).any() for first, block in _blocks(dims)):
        raise DatasetError(f"{path}: entries of several dimensions: not sequences of ids, but tensors")
    num_tokens = _check_offsets(path, offsets, lengths)
    if documents.size == 0 or documents[0] != 0 or documents[-1] != sequences:
        raise DatasetError(
            f"{path}: the document bounds do not span the {sequences:,} sequences (old versions of Megatron's merge "
            "lost those of all parts but the first); encode the text again"
        )
    if any((np.diff(documents[first : first + _BLOCK + 1]) < 0).any() for first, _ in _blocks(documents)):
        raise DatasetError(f"{path}: the document bounds go backwards")
    file = _File(prefix, Path(f"{prefix}.bin"), np.dtype(_DTYPES[code]), lengths, documents, num_tokens)
    _check_size(file, itemsize)
    return file


def _check_offsets(path: str, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
    """The number of tokens, once offsets and lengths agree."""
    for first, block in _blocks(lengths):
        steps = np.diff(offsets[first : first + len(block) + 1])
        if (block < 0).any() or (block > _LONGEST).any() or (steps != block).any():
            raise DatasetError(f"{path}: lengths and offsets near sequence {first:,} disagree")
    if offsets[0] != 0:
        raise DatasetError(f"{path}: the first offset is {offsets[0]}, not 0")
    return int(offsets[-1])


def _open_datatrove(prefix: str) -> TokenFile:
    index = map_file(Path(prefix + ".index"))
    if index.size % 8:
        raise DatasetError(
            f"{prefix}.index: {index.size:,} bytes, not a whole number of u64: is it cut short?"
        )
    ends = index.view("<u8")
    if ends.size and ends.max() > np.iinfo(np.int64).max // 8:
        raise DatasetError(f"{prefix}.index: a document ends at {ends.max():,}; that is no index")
    lengths = _Differences(ends.view("<i8"))
    for first in range(0, len(lengths), _BLOCK):
        block = lengths[first : first + _BLOCK]
        if (block < 0).any() or (block > _LONGEST).any():
            raise DatasetError(
                f"{prefix}.index: the ends of documents near {first:,} go backwards, or too far"
            )
    num_tokens = int(ends[-1]) if ends.size else 0
    size = _size_of(Path(prefix))
    said = _metadata(prefix)
    itemsize = size // num_tokens if num_tokens else said[0] or 2
    if itemsize not in (2, 4) or said[0] not in (None, itemsize) or said[1] not in (None, num_tokens):
        raise DatasetError(
            f"{prefix}: {size:,} bytes for {num_tokens:,} ids ({prefix}.metadata: {said[1]} of {said[0]} bytes); "
            "2 or 4 bytes an id are known: copy the files again from where they are whole"
        )
    dtype = np.dtype("<u2" if itemsize == 2 else "<i4")
    file = _File(prefix, Path(prefix), dtype, lengths, _Counting(len(lengths) + 1), num_tokens)
    _check_size(file, itemsize)
    if itemsize == 4:
        ids = map_file(file.path).view("<i4")
        if any(block.min() < 0 for _, block in _blocks(ids)):
            raise DatasetError(f"{prefix}: an id of 2^31 or more, which no Megatron dataset can hold")
    return file


def _metadata(prefix: str) -> tuple[int | None, int | None]:
    """(bytes per id, number of ids) as FILE.ds.metadata says, where it does."""
    try:
        lines = Path(prefix + ".metadata").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None, None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{prefix}.metadata: cannot be read: {error}") from None
    if len(lines) < 2 or not lines[1].isdecimal():
        raise DatasetError(f"{prefix}.metadata: not the metadata of a .ds file (tokenizer, number of ids)")
    _, _, itemsize = lines[0].rpartition("|")
    return int(itemsize) if itemsize.isdecimal() and "|" in lines[0] else None, int(lines[1])


class _Differences:
    """[N] lengths out of cumulative ends, slice by slice."""

    def __init__(self, ends: NDArray[np.int64]) -> None:
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, part: slice) -> NDArray[np.int64]:
        start, stop, _ = part.indices(len(self))
        before = self._ends[start - 1 : start] if start else np.zeros(1, np.int64)
        return np.diff(self._ends[start : max(start, stop)], prepend=before)


class _Counting:
    """0, 1, 2, …: the bounds of documents of one sequence each, slice by slice."""

    def __init__(self, length: int) -> None:
        self._range = range(length)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, part: slice) -> NDArray[np.int64]:
        chosen = self._range[part]
        return np.arange(chosen.start, chosen.stop)


def _blocks(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    return ((first, values[first : first + _BLOCK]) for first in range(0, len(values), _BLOCK))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None


def _check_size(file: _File, itemsize: int) -> None:
    size, expected = _size_of(file.path), file.num_tokens * itemsize
    if size != expected:
        raise DatasetError(f"{file.path}: {size:,} bytes, but its index describes {expected:,}")
