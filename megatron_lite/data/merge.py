"""Several datasets into one, one into several: bytes are copied and indices added up, nothing is encoded again.

The result is Megatron-core's `add_index`: ids back to back, lengths appended, document bounds moved by the sequences
before them. Memory does not grow with the data.
"""

from __future__ import annotations

import glob
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.errors import DatasetError
from megatron_lite.data.indexed import index_header
from megatron_lite.data.legacy import TokenFile, open_tokens
from megatron_lite.data.sidecar import Checksums, Sidecar, check_sidecars, read_sidecar, write_sidecar
from megatron_lite.data.writer import publish

logger = logging.getLogger(__name__)

_ENDINGS = (".idx", ".bin", ".ds")
_BLOCK = 1 << 20  # entries of an index at once
_COPY = 1 << 24  # bytes of ids at once
_MOST_BYTES = (1 << 63) - 1  # offsets are i64


class Merged(NamedTuple):
    """What one written dataset holds."""

    prefix: str
    documents: int
    sequences: int
    tokens: int


def expand_prefixes(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The datasets that `inputs` name, in the order of the inputs; those of one folder or glob sorted by name.

    An input is a prefix, one of its files (.idx, .bin), a FILE.ds, a folder (all datasets right in it), or a glob of
    such files. What is named twice comes twice.

    Raises DatasetError for an input that names none.
    """
    found = []
    for entry in (os.fspath(entry) for entry in inputs):
        if os.path.isdir(entry):
            names = glob.glob(os.path.join(glob.escape(entry), "*"))
        elif glob.has_magic(entry) and not os.path.exists(entry) and not os.path.exists(entry + ".idx"):
            names = glob.glob(entry, recursive=True)
        else:
            found.append(_prefix_of(entry) or entry)
            continue
        # The .bin and .idx of a pair are one dataset; a .bin alone is one too: a damaged one, which is an error later.
        prefixes = sorted({prefix for name in names if (prefix := _prefix_of(name)) is not None})
        if not prefixes:
            raise DatasetError(f"{entry}: no dataset there (.bin and .idx, or .ds)")
        found += prefixes
    return found


def _prefix_of(name: str) -> str | None:
    end = os.path.splitext(name)[1]
    if end not in _ENDINGS:
        return None
    return name if end == ".ds" else name.removesuffix(end)


class _Part(NamedTuple):
    """Consecutive documents of one dataset, and where their sequences and ids lie."""

    source: TokenFile
    documents: range
    sequences: range
    tokens: range


def merge_datasets(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    *,
    shares: Sequence[Fraction] | None = None,
    documents_per_part: int | None = None,
) -> list[Merged]:
    """Write the documents of all `inputs` (see `expand_prefixes`) in order as one dataset, or as several.

    shares: PREFIX_00000, PREFIX_00001, …, each with its share of the documents, in order
    documents_per_part: the same, each with so many documents, the last with the rest

    A sidecar is written where every input has one. Files are written beside their place and renamed when all of them
    are whole; after an error nothing is left.

    Raises DatasetError for inputs that are missing, damaged, of different types or made by different tokenizers, for an
    output that is one of the inputs, and for shares that leave a part without documents.
    """
    prefixes = expand_prefixes(inputs)
    sources = [open_tokens(prefix) for prefix in prefixes]
    sidecar = _common_sidecar(prefixes)
    _check_types(sources)
    total = sum(len(source.document_bounds) - 1 for source in sources)
    names, edges = [os.fspath(output_prefix)], [0, total]
    if shares is not None or documents_per_part is not None:
        edges = _edges(total, shares, documents_per_part)
        names = [f"{os.fspath(output_prefix)}_{number:05d}" for number in range(len(edges) - 1)]
        for place in glob.glob(f"{glob.escape(os.fspath(output_prefix))}_[0-9][0-9][0-9][0-9][0-9].idx"):
            if (other := place.removesuffix(".idx")) not in names:
                raise DatasetError(f"{other}: part of an earlier split into more parts; remove it first")
    taken = {os.path.realpath(path) for source in sources for path in (source.path, f"{source.prefix}.idx")}
    for name in names:
        if any(os.path.realpath(name + end) in taken for end in (".bin", ".idx")):
            raise DatasetError(f"{name}: is an input and the output; take another output prefix")
    merged = []
    suffix = f".tmp-{os.getpid()}"
    with ExitStack() as stack:
        for name, parts in zip(names, _cut(sources, edges), strict=True):
            stack.callback(_discard, name, suffix)
            merged.append(_write(name, suffix, sources[0].dtype, parts, sidecar is not None))
        for counts, checksums in merged:
            publish(counts.prefix, suffix)
            if sidecar is not None:
                _, documents, sequences, tokens = counts
                own = replace(
                    sidecar, documents=documents, sequences=sequences, tokens=tokens, checksums=checksums
                )
                write_sidecar(counts.prefix, own)
    return [counts for counts, _ in merged]


def _edges(total: int, shares: Sequence[Fraction] | None, documents_per_part: int | None) -> list[int]:
    """Document numbers between the parts, from 0 to `total`."""
    if shares is None:
        assert documents_per_part is not None
        return [*range(0, total, documents_per_part), total]
    ends = np.cumsum(np.array([Fraction(0), *shares], dtype=object))
    if min(shares) <= 0:
        raise DatasetError("the shares of a split are numbers above 0")
    edges = [round(total * end / ends[-1]) for end in ends]
    for number, (start, stop) in enumerate(pairwise(edges)):
        if start == stop:
            raise DatasetError(
                f"part {number} of the split gets none of the {total:,} documents; give it more"
            )
    return edges


def _check_types(sources: Sequence[TokenFile]) -> None:
    first = sources[0]
    for source in sources[1:]:
        if source.dtype != first.dtype:
            raise DatasetError(
                f"{source.prefix}: ids are {source.dtype.name}, those of {first.prefix} {first.dtype.name}: made with "
                "vocabularies of different size; encode the texts of both with one tokenizer"
            )
    size = sum(source.num_tokens * source.dtype.itemsize for source in sources)
    if size > _MOST_BYTES:
        raise DatasetError(f"{size:,} bytes of ids together: the format holds {_MOST_BYTES:,}")


def _common_sidecar(prefixes: Sequence[str]) -> Sidecar | None:
    """What the inputs' sidecars say in common; None where one has none. Raises DatasetError where they differ."""
    check_sidecars((prefix for prefix in prefixes if not prefix.endswith(".ds")), None)
    sidecars = [(prefix, read_sidecar(prefix)) for prefix in prefixes]
    found = [(prefix, sidecar) for prefix, sidecar in sidecars if sidecar is not None]
    for prefix, sidecar in found:
        for name in ("fingerprint", "vocab_size", "eod_id", "append_eod", "special_tokens"):
            one, other = getattr(found[0][1], name), getattr(sidecar, name)
            if one != other:
                raise DatasetError(
                    f"{prefix}: made with another tokenizer or other settings than {found[0][0]}: {name} {other}, "
                    f"not {one} ({prefix}.json); encode the texts of both in one way"
                )
    if len(found) < len(sidecars):
        if found:
            missing = next(prefix for prefix, sidecar in sidecars if sidecar is None)
            logger.warning("%s has no .json beside it, so that the result gets none", missing)
        return None
    return found[0][1]


def _cut(sources: Sequence[TokenFile], edges: Sequence[int]) -> list[list[_Part]]:
    """For each pair of edges, documents counted over all sources, the parts of the sources between them."""
    found: list[list[_Part]] = [[] for _ in edges[1:]]
    before = 0
    for source in sources:
        count = len(source.document_bounds) - 1
        token = 0
        for parts, (start, stop) in zip(found, pairwise(edges), strict=True):
            chosen = range(max(start - before, 0), min(stop - before, count))
            if chosen:
                first, last = (
                    int(source.document_bounds[at : at + 1][0]) for at in (chosen.start, chosen.stop)
                )
                after = token + _sum(source, range(first, last))
                parts.append(_Part(source, chosen, range(first, last), range(token, after)))
                token = after
        before += count
    return found


def _sum(source: TokenFile, sequences: range) -> int:
    return sum(int(block.sum()) for block in _slices(source.lengths, sequences))


def _slices(values: Any, part: range) -> Iterator[NDArray[np.int64]]:
    for first in range(part.start, part.stop, _BLOCK):
        yield np.asarray(values[first : min(first + _BLOCK, part.stop)], dtype=np.int64)


def _write(
    name: str, suffix: str, dtype: np.dtype[Any], parts: list[_Part], summed: bool
) -> tuple[Merged, Checksums]:
    """The unfinished files of one dataset, whole; of the .bin a checksum only where it is wanted."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    of_bin = of_idx = 0
    with open(f"{name}.bin{suffix}", "wb") as file:
        for part in parts:
            with open(part.source.path, "rb") as ids:
                place = range(part.tokens.start * dtype.itemsize, part.tokens.stop * dtype.itemsize)
                if summed:
                    of_bin = _copy_and_sum(ids, place, file, of_bin)
                else:
                    _copy(ids, place, file)
        file.flush()
        os.fsync(file.fileno())
    with open(f"{name}.idx{suffix}", "wb") as file:
        for data in _index(dtype, parts):
            file.write(data)
            of_idx = zlib.crc32(data, of_idx)
        file.flush()
        os.fsync(file.fileno())
    counts = (
        sum(len(getattr(part, what)) for part in parts) for what in ("documents", "sequences", "tokens")
    )
    return Merged(name, *counts), Checksums.of(of_bin, of_idx)


def _index(dtype: np.dtype[Any], parts: list[_Part]) -> Iterator[bytes]:
    lengths = [(part.source.lengths, part.sequences) for part in parts]
    sequences, documents = (
        sum(len(getattr(part, what)) for part in parts) for what in ("sequences", "documents")
    )
    yield index_header(dtype, sequences, documents + 1)
    for values, place in lengths:
        yield from (block.astype("<i4").tobytes() for block in _slices(values, place))
    end = 0
    for values, place in lengths:
        for block in _slices(values, place):
            ends = end + np.cumsum(block * dtype.itemsize)
            yield (ends - block * dtype.itemsize).astype("<i8").tobytes()
            end = int(ends[-1])
    yield np.zeros(1, "<i8").tobytes()
    before = 0
    for part in parts:
        bounds = range(part.documents.start + 1, part.documents.stop + 1)
        for block in _slices(part.source.document_bounds, bounds):
            yield (block + (before - part.sequences.start)).astype("<i8").tobytes()
        before += len(part.sequences)


def _copy(source: BinaryIO, place: range, target: BinaryIO) -> None:
    """Append the bytes without their passing through this process, where the system can."""
    target.flush()
    at = place.start
    try:
        while at < place.stop:
            count = os.copy_file_range(source.fileno(), target.fileno(), place.stop - at, at)
            if count == 0:
                break
            at += count
    except (OSError, AttributeError):
        pass  # not between these file systems, or not on this one: what remains goes through memory
    _copy_and_sum(source, range(at, place.stop), target, 0)


def _copy_and_sum(source: BinaryIO, place: range, target: BinaryIO, checksum: int) -> int:
    """Append the bytes; returns the CRC-32 that `checksum` becomes with them."""
    source.seek(place.start)
    remaining = len(place)
    while remaining:
        data = source.read(min(remaining, _COPY))
        if not data:
            raise DatasetError(f"{source.name}: became shorter while it was read")
        target.write(data)
        checksum = zlib.crc32(data, checksum)
        remaining -= len(data)
    return checksum


def _discard(name: str, suffix: str) -> None:
    for end in (".bin", ".idx"):
        Path(name + end + suffix).unlink(missing_ok=True)
