"""Tokenized text on disk: PREFIX.bin (token ids, back to back) and PREFIX.idx (where each sequence lies).

The format is Megatron-core's, byte for byte. PREFIX.idx, little-endian: magic, u64 version 1, u8 dtype code,
u64 sequences N, u64 length M of the document array, i32[N] tokens per sequence, i64[N] byte offset of each
sequence, i64[M] document bounds in sequence numbers (the first is 0, the last N). A document without tokens
has no sequence.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.errors import DatasetError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# Code 6 and 7 are float64 and float32 (in GPT-NeoX the other way round): never token ids.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_CHUNK = 1 << 20  # sequences or bounds verified at once: bounds the memory of opening a large index
_AGAIN = "run tools/preprocess_data.py again, or copy both files again from where they are whole"


def token_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The type Megatron-core writes ids in: uint16 below 65500 entries, else (or not known) int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """The sequences of PREFIX.bin, mapped, not read: `dataset[i]` is a view of sequence i's ids.

    Opening verifies magic, version, dtype, the sizes of both files, every offset and the document bounds.

    prefix: path without .bin/.idx
    dtype: type of the ids on disk
    lengths: [N] int32, tokens per sequence (may be unaligned in memory)
    offsets: [N] int64, bytes from the beginning of PREFIX.bin (may be unaligned)
    document_bounds: [M] int64; document d is sequences document_bounds[d] up to document_bounds[d + 1]
    tokens: [num_tokens] all ids in file order
    num_tokens: their number

    Raises DatasetError if a file is missing, truncated or not what its index says.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.path = Path(self.prefix + ".bin")
        index_path = Path(self.prefix + ".idx")
        index = map_file(index_path)
        header = _read_header(index_path, index)
        self.dtype = header.dtype
        starts = np.cumsum([_HEADER.size, 4 * header.sequences, 8 * header.sequences, 8 * header.bounds])
        self.lengths: NDArray[np.int32] = index[starts[0] : starts[1]].view("<i4")
        self.offsets: NDArray[np.int64] = index[starts[1] : starts[2]].view("<i8")
        self.document_bounds: NDArray[np.int64] = index[starts[2] : starts[3]].view("<i8")
        self.num_tokens = _check_index(
            index_path, self.lengths, self.offsets, self.dtype, self.document_bounds
        )
        self.tokens: NDArray[Any] = self._map_tokens()

    def _map_tokens(self) -> NDArray[Any]:
        data = map_file(self.path)
        expected = self.num_tokens * self.dtype.itemsize
        if data.size != expected:
            message = f"{self.path}: {data.size:,} bytes, but {self.prefix}.idx describes {expected:,}"
            extra = data.size - expected
            if extra == (len(self.document_bounds) - 1) * self.dtype.itemsize:
                message += (
                    ": exactly one token more a document, as Megatron-DeepSpeed writes with --append-eod (it "
                    "leaves the end-of-document token out of the lengths, so every text is read shifted)"
                )
            raise DatasetError(f"{message}; {_AGAIN}")
        return data.view(self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"{self.prefix}: sequence {sequence} of {len(self)}")
        return self.get(sequence % len(self))

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.get(sequence) for sequence in range(len(self)))

    def get(self, sequence: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Ids start..stop of one sequence, as a view (no copy)."""
        base = int(self.offsets[sequence]) // self.dtype.itemsize
        length = int(self.lengths[sequence])
        return self.tokens[base + start : base + (length if stop is None else min(stop, length))]

    @property
    def num_documents(self) -> int:
        return len(self.document_bounds) - 1

    def document_lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start] tokens of each of these documents, whatever sequences they are in."""
        bounds = self.document_bounds[start : stop + 1]
        places = np.full(len(bounds), self.num_tokens, dtype=np.int64)  # what begins after the last sequence
        before_end = bounds < len(self)
        places[before_end] = self.offsets[bounds[before_end]] // self.dtype.itemsize
        return np.diff(places)


class Header(NamedTuple):
    """What PREFIX.idx begins with: the type of the ids, and how long its arrays are."""

    dtype: np.dtype[Any]
    sequences: int
    bounds: int


def read_header(path: Path) -> Header:
    """The header of an index, its arrays unread. Raises DatasetError where the file is none, or not that long."""
    return _read_header(path, map_file(path))


def index_header(dtype: np.dtype[Any], sequences: int, bounds: int) -> bytes:
    """What `read_header` reads."""
    return _HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, bounds)


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes, mapped read-only (an empty file cannot be mapped)."""
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; give the prefix without .bin or .idx") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None


def _read_header(path: Path, index: NDArray[np.uint8]) -> Header:
    if index.size < _HEADER.size or bytes(index[: len(MAGIC)]) != MAGIC:
        old = index[:6].tobytes() == b"TNTIDX"
        hint = "it is of an older one (TNTIDX), which tools/merge_datasets.py converts" if old else _AGAIN
        raise DatasetError(f"{path}: not an index of Megatron's format (MMIDIDX); {hint}")
    _, version, code, sequences, bounds = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if version != VERSION:
        raise DatasetError(f"{path}: version {version} of the format, known is {VERSION}; {_AGAIN}")
    if code not in _DTYPES:
        floats = " (float32 or float64; in GPT-NeoX the other way round)" if code in (6, 7) else ""
        raise DatasetError(f"{path}: dtype code {code} is no type of token ids{floats}; {_AGAIN}")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if index.size != expected:
        hint = ""
        if index.size == expected + sequences:
            hint = " (one byte a sequence more: a multimodal file, which text training cannot use)"
        raise DatasetError(f"{path}: {index.size:,} bytes, its header describes {expected:,}{hint}; {_AGAIN}")
    return Header(np.dtype(_DTYPES[code]), sequences, bounds)


def _running_offsets(lengths: NDArray[np.int32], itemsize: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(first, byte offsets of sequences first, first + 1, ... and the end of the last one), chunk by
    chunk."""
    end = 0
    for first in range(0, len(lengths), _CHUNK):
        steps = np.asarray(lengths[first : first + _CHUNK], dtype=np.int64) * itemsize
        offsets = np.concatenate(([end], steps)).cumsum()
        end = int(offsets[-1])
        last = first + _CHUNK >= len(lengths)
        yield first, offsets if last else offsets[:-1]


def _check_index(
    path: Path,
    lengths: NDArray[np.int32],
    offsets: NDArray[np.int64],
    dtype: np.dtype[Any],
    bounds: NDArray[np.int64],
) -> int:
    """Number of tokens, once lengths, offsets and document bounds agree with each other."""
    end = 0
    for first, expected in _running_offsets(lengths, dtype.itemsize):
        chunk = slice(first, first + _CHUNK)
        stored = offsets[chunk]
        if (lengths[chunk] < 0).any() or (stored != expected[: len(stored)]).any():
            wrapped = (lengths[chunk] >= 0).all() and (
                stored == expected[: len(stored)].astype(np.int32)
            ).all()
            hint = " (the offsets were counted in 32 bits)" if wrapped else ""
            raise DatasetError(
                f"{path}: lengths and offsets near sequence {first:,} disagree{hint}; {_AGAIN}"
            )
        end = int(expected[-1])
    if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(lengths):
        raise DatasetError(
            f"{path}: the document bounds do not span the {len(lengths):,} sequences (merges by old versions of "
            f"Megatron left them out); {_AGAIN}"
        )
    for first in range(0, len(bounds), _CHUNK):
        if (np.diff(bounds[first : first + _CHUNK + 1]) < 0).any():
            raise DatasetError(f"{path}: the document bounds near document {first:,} go backwards; {_AGAIN}")
    return end // dtype.itemsize
