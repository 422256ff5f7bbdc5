"""index.json: what a checkpoint holds, where, and how to tell that it is whole.

`{"checksum":"crc32:…","content":{format, version, step, metadata, parameters, files}}`, where `parameters`
maps each global name to its shape and sharded dimension, and `files` maps each file to its size, the
checksum of its header, and its pieces in file order. The checksum is of the bytes of `content` as they stand in the
file. The index is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import DTYPES_BY_NAME, Written, write_atomically
from megatron_lite.checkpoint.layout import Span, Stored

INDEX = "index.json"
FORMAT = "megatron_lite"
# The key of the metadata that tells which tokenizer the weights were trained with.
TOKENIZER = "tokenizer_fingerprint"
VERSION = 2  # 1 had the checksum of the content with its keys sorted
HEADER = "its header"  # of a file, beside the keys of its pieces, which all have slashes
_HEAD = '{"checksum":"crc32:%08x","content":'


def key_of(piece: Stored) -> str:
    """The name of a piece inside its file: enough to piece a parameter together without the index."""
    return f"{piece.kind}/{piece.name}/{piece.span.start}:{piece.span.stop}/{piece.span.flat_start}"


class Range(NamedTuple):
    """Where something lies in its file, in bytes, and its checksum."""

    begin: int
    size: int
    crc: int


@dataclass(frozen=True)
class FileEntry:
    """One rank's file: the pieces in it, and what it must look like."""

    file: str
    pieces: dict[str, Stored]  # by key
    written: Written

    def to_json(self) -> dict[str, Any]:
        rows = []
        for key, crc in self.written.tensor_crcs.items():
            piece = self.pieces[key]
            rows.append([piece.kind, piece.name, *piece.span, piece.dtype, crc])
        written = self.written
        return {
            "bytes": written.bytes,
            "header_bytes": written.header_bytes,
            "header_crc32": written.header_crc,
            "pieces": rows,
        }

    def parameters(self) -> dict[str, dict[str, Any]]:
        """The shape, and the dimension that is sharded, of each parameter that the file holds something of."""
        return {piece.name: {"shape": list(piece.shape), "dim": piece.dim} for piece in self.pieces.values()}

    def ranges(self) -> dict[str, Range]:
        """The header, under HEADER, and the pieces, in file order."""
        begin = self.written.header_bytes
        found = {HEADER: Range(0, begin, self.written.header_crc)}
        for key, crc in self.written.tensor_crcs.items():
            piece = self.pieces[key]
            size = (piece.span.flat_stop - piece.span.flat_start) * DTYPES_BY_NAME[piece.dtype].itemsize
            found[key] = Range(begin, size, crc)
            begin += size
        return found

    @classmethod
    def from_json(cls, file: str, entry: Mapping[str, Any], parameters: Mapping[str, Any]) -> FileEntry:
        pieces, crcs = {}, {}
        for kind, name, start, stop, flat_start, flat_stop, dtype, crc in entry["pieces"]:
            shape, dim = tuple(parameters[name]["shape"]), parameters[name]["dim"]
            piece = Stored(name, kind, shape, dim, Span(start, stop, flat_start, flat_stop), dtype)
            pieces[key_of(piece)] = piece
            crcs[key_of(piece)] = crc
        return cls(file, pieces, Written(entry["bytes"], entry["header_bytes"], entry["header_crc32"], crcs))


def entry_to_text(entry: FileEntry) -> str:
    """A file's entry, for another rank."""
    return _text([entry.file, entry.to_json(), entry.parameters()])


def entry_from_text(text: str) -> FileEntry:
    """The entry that `entry_to_text` was given."""
    return FileEntry.from_json(*json.loads(text))


class Index(NamedTuple):
    """The content of index.json, as Python objects."""

    step: int
    metadata: dict[str, Any]
    files: list[FileEntry]


def write_index(folder: Path, index: Index) -> None:
    """Write index.json into `folder`. Raises ValueError where the metadata is not plain JSON."""
    parameters: dict[str, Any] = {}
    for entry in index.files:
        parameters |= entry.parameters()
    head = {"format": FORMAT, "version": VERSION, "step": index.step, "metadata": index.metadata}
    # A file at a time: of all the pieces of a large run at once, other threads, training's, would wait for seconds.
    files = ",".join(f"{_text(entry.file)}:{_text(entry.to_json())}" for entry in index.files)
    content = f'{_text(head | {"parameters": parameters})[:-1]},"files":{{{files}}}}}'.encode()
    write_atomically(folder / INDEX, (_HEAD % zlib.crc32(content)).encode() + content + b"}")


def read_index(folder: Path) -> Index:
    """Read and check index.json.

    Raises CheckpointError where it is absent, damaged or of another format, or names files of other folders.
    """
    path = folder / INDEX
    try:
        data = path.read_bytes()
        whole = json.loads(data)
        content = whole["content"]
        version, intact = content["version"], _intact(data, whole)
    except FileNotFoundError:
        fault = "is not there, so the folder is no complete checkpoint (a save that was cut short?)"
        raise CheckpointError(f"{path} {fault}; use another step") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); use another step or restore it") from error
    if not intact:
        raise CheckpointError(f"{path} does not match its own checksum; use another step or restore the file")
    if content.get("format") != FORMAT or version not in (1, VERSION):
        found = f"{content.get('format')} version {version}"
        raise CheckpointError(f"{path} is {found}, and this release reads {FORMAT} up to version {VERSION}")
    try:
        step, metadata, parameters = content["step"], content["metadata"], content["parameters"]
        files = [FileEntry.from_json(file, entry, parameters) for file, entry in content["files"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of a checkpoint ({error!r}); use another step") from error
    for entry in files:
        if entry.file in ("", "..") or Path(entry.file).name != entry.file:
            fault = f'{path} names "{entry.file}", which is not in its folder'
            raise CheckpointError(f"{fault}; do not load what others may have changed")
    return Index(step, metadata, files)


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _intact(data: bytes, whole: dict[str, Any]) -> bool:
    """Whether each byte is what was written: 1e-5 and 1E-5 are the same number, and not the same bytes."""
    if whole["content"]["version"] == 1:
        text = json.dumps(whole["content"], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return data == _text(whole).encode() and whole["checksum"] == f"crc32:{zlib.crc32(text.encode()):08x}"
    head = len(_HEAD % 0)
    return data[:head] == (_HEAD % zlib.crc32(data[head:-1])).encode()


def check_size(folder: Path, entry: FileEntry) -> str | None:
    """What a look at the directory says is wrong with one file, or None."""
    path = folder / entry.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    if size != entry.written.bytes:
        return f"{path} has {size} bytes instead of the {entry.written.bytes} that were written"
    return None
