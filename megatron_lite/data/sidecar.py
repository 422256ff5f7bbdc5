"""PREFIX.json beside PREFIX.bin and .idx: what the pair does not say of itself.

Which tokenizer made it (a fingerprint of vocabulary and rules, so that the same tokenizer at another path is the
same), which id ends documents, how much there is, and a checksum of each file. Datasets without one are taken as
they are. Reading and writing one takes the standard library only.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_lite.data.errors import DatasetError

if TYPE_CHECKING:
    import numpy as np

    from megatron_lite.config import DataConfig
    from megatron_lite.data.writer import WriterState

FORMAT = "megatron_lite dataset"
VERSION = 1
_LARGEST = 1 << 20  # a larger .json is something else, a corpus maybe
_BLOCK = 1 << 23
_AGAIN = "or remove it where you know better: datasets without one are taken as they are"


class Checksums(NamedTuple):
    """CRC-32 of each file, as eight hexadecimal digits. It is fast, can be continued after an interruption, and finds
    damage; it is no protection against forgery."""

    bin: str
    idx: str

    @classmethod
    def of(cls, of_bin: int, of_idx: int) -> Checksums:
        return cls(f"{of_bin:08x}", f"{of_idx:08x}")

    @classmethod
    def of_files(cls, prefix: str | os.PathLike[str]) -> Checksums:
        """Read both files of a dataset to the end."""
        return cls.of(*(_crc32(Path(f"{os.fspath(prefix)}.{end}")) for end in cls._fields))


@dataclass(frozen=True)
class Sidecar:
    """tokenizer: its specification when the data were made (its files may have moved since)
    fingerprint: `Tokenizer.fingerprint()`
    vocab_size: largest id + 1
    eod_id: the id that ends documents, None where the vocabulary has none
    append_eod: whether it was appended to every document that is not empty
    special_tokens: "plain" where their names in a text were only letters, "parse" where they became ids
    dtype: of the ids in the .bin
    documents, sequences, tokens: how many the pair holds, empty documents and eod included
    checksums: {"crc32 of .bin": ..., "crc32 of .idx": ...}
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    eod_id: int | None
    append_eod: bool
    special_tokens: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    checksums: Checksums


class _Tokenizer(Protocol):
    """What of `tokenizers.Tokenizer` is kept."""

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int | None: ...

    def fingerprint(self) -> str: ...


def sidecar_of(
    tokenizer: _Tokenizer,
    dtype: np.dtype[Any],
    state: WriterState,
    checksums: Checksums,
    *,
    append_eod: bool = False,
    special_tokens: str = "plain",
) -> Sidecar:
    """The sidecar of what an IndexedDatasetWriter wrote: its `dtype`, `state` and `checksums`."""
    return Sidecar(
        tokenizer=tokenizer.name,
        fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        append_eod=append_eod,
        special_tokens=special_tokens,
        dtype=dtype.name,
        documents=state.documents,
        sequences=state.sequences,
        tokens=state.tokens,
        checksums=checksums,
    )


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(prefix) + ".json")


def check_place(prefix: str | os.PathLike[str]) -> None:
    """Raise DatasetError where PREFIX.json is a file that is no sidecar."""
    path = sidecar_path(prefix)
    if path.exists() and _load(path) is None:
        raise DatasetError(f"{path}: would be written over, and is not a dataset's: take another prefix")


def write_sidecar(prefix: str | os.PathLike[str], sidecar: Sidecar) -> None:
    """Write PREFIX.json at once. Raises DatasetError where a file stands there that is no sidecar."""
    check_place(prefix)
    path = sidecar_path(prefix)
    content = {"format": FORMAT, "version": VERSION, **asdict(sidecar)}
    content["checksums"] = {f"crc32 of .{end}": value for end, value in sidecar.checksums._asdict().items()}
    temporary = Path(f"{path}.partial")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """What PREFIX.json says; None where there is none. Raises DatasetError for one that is damaged or newer."""
    path = sidecar_path(prefix)
    content = _load(path)
    if content is None:
        return None
    if content.get("version") != VERSION:
        raise DatasetError(f"{path}: version {content.get('version')}, known is {VERSION}; update, {_AGAIN}")
    try:
        own = {field.name: content[field.name] for field in fields(Sidecar)}
        own["checksums"] = Checksums(*(own["checksums"][f"crc32 of .{end}"] for end in Checksums._fields))
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{path}: damaged: {error} is missing; run tools/preprocess_data.py again, {_AGAIN}"
        ) from None
    return Sidecar(**own)


def remove_sidecar(prefix: str | os.PathLike[str]) -> None:
    """Before the pair changes. A file of that name that is no sidecar stays."""
    if _load(sidecar_path(prefix)) is not None:
        sidecar_path(prefix).unlink(missing_ok=True)


def check_sidecars(prefixes: Iterable[str], fingerprint: str | None) -> None:
    """Raise DatasetError for a dataset of another tokenizer, or one that is not what its sidecar counted.

    fingerprint: of the tokenizer that will read the ids; None: not known, counts alone are compared
    """
    from megatron_lite.data.indexed import read_header

    for prefix in prefixes:
        sidecar = read_sidecar(prefix)
        path = sidecar_path(prefix)
        if sidecar is None or not all(os.path.exists(prefix + end) for end in (".bin", ".idx")):
            continue  # what is missing is for opening the dataset to report
        if fingerprint is not None and sidecar.fingerprint != fingerprint:
            raise DatasetError(
                f"{prefix}: made with another tokenizer, {sidecar.tokenizer} ({path} has its fingerprint); "
                f"set data.tokenizer to that one, encode the text again, {_AGAIN}"
            )
        header = read_header(Path(prefix + ".idx"))
        size = Path(prefix + ".bin").stat().st_size
        found = (header.sequences, header.bounds - 1, size // header.dtype.itemsize, header.dtype.name)
        said = (sidecar.sequences, sidecar.documents, sidecar.tokens, sidecar.dtype)
        for what, one, other in zip(("sequences", "documents", "tokens", "dtype"), said, found, strict=True):
            if one != other:
                raise DatasetError(
                    f"{path}: {what} {one}, but the pair beside it has {other}: it was changed since; "
                    f"encode the text again, {_AGAIN}"
                )


def check_datasets(config: DataConfig, fingerprint: str | None) -> None:
    """`check_sidecars` of everything that the config's data keys name."""
    from megatron_lite.config.sections import prefixes

    for value in (config.train, config.valid, config.test):
        check_sidecars(prefixes(value), fingerprint)


def _load(path: Path) -> dict[str, Any] | None:
    """The file's JSON object, where it says that it is a sidecar."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
