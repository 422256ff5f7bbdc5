"""Finding and opening the files of a corpus: folders, globs, formats by ending, compression."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, cast

Format = Literal["jsonl", "text", "parquet", "warc"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
}
_COMPRESSIONS = (".gz", ".zst")
_NEEDS = {
    ".zst": ("zstandard",),
    ".parquet": ("pyarrow",),
    ".warc": ("warcio", "resiliparse"),
    ".wet": ("warcio",),
}
_SIDE_FILES = (".manifest.json", ".report.json", ".bin", ".idx", ".partial")  # our own tools write these
_TEMPORARY = re.compile(r"\.tmp-\d+$")
_NOT_READ = (".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".tar", ".tgz")
_FEED = 1 << 14  # compressed bytes at once: what they become is held in memory
_MAX_WINDOW = 1 << 31  # `zstd --long=31`, as public dumps of forums are compressed


class CorpusError(ValueError):
    """Input that cannot be used; the message names file, line and reason."""


def expand_inputs(inputs: Sequence[str | Path]) -> list[str]:
    """The files that `inputs` name, in the order of the inputs; those of one folder or glob sorted by name.

    A path that exists is taken as it is, whatever characters it holds. A folder stands for every file below it of a
    known ending (hidden files and folders aside); a glob ("data/*.jsonl", "data/**/*.gz") for what it matches, the
    folders among it included. Both pass over what our tools write beside a corpus (datasets with their sidecars,
    manifests, reports, unfinished files). What is named twice comes twice. Expanding the result again changes nothing.

    Raises CorpusError for an input that names no file.
    """
    return [path for entry in inputs for path in _expand(os.fspath(entry))]


def _expand(entry: str) -> list[str]:
    if os.path.isdir(entry):
        below = sorted(_files_below(entry))
        if not below:
            endings = " ".join(_FORMATS)
            raise CorpusError(
                f"{entry}: cannot be read: a folder without files of a known ending ({endings})"
            )
        return below
    if os.path.exists(entry) or not glob.has_magic(entry):
        _check_file(entry)
        return [entry]
    files: set[str] = set()
    for path in glob.glob(entry, recursive=True):
        files.update(_files_below(path) if os.path.isdir(path) else [] if _is_side_file(path) else [path])
    if not files:
        raise CorpusError(f"{entry}: cannot be read: no file matches")
    for path in files:
        _check_file(path)
    return sorted(files)


def _files_below(folder: str) -> Iterator[str]:
    seen = set()  # a folder that links lead to again is entered once: they may go in circles

    def fail(error: OSError) -> None:
        raise error

    with reading(folder):
        for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
            real = os.path.realpath(place)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
            if real not in seen:
                shown = (name for name in names if not name.startswith("."))
                known = (os.path.join(place, name) for name in shown if split_ending(name)[0] in _FORMATS)
                yield from (path for path in known if not _is_side_file(path))
            seen.add(real)


def _is_side_file(path: str) -> bool:
    """What our tools write beside a corpus; a dataset's sidecar is known by the dataset beside it."""
    stem, ending = os.path.splitext(path)
    return (
        path.endswith(_SIDE_FILES)
        or _TEMPORARY.search(path) is not None
        or (ending == ".json" and any(os.path.exists(f"{stem}.{part}") for part in ("bin", "idx")))
    )


def _check_file(path: str) -> None:
    """A file that is missing or may not be read is an error before the first line of any other is."""
    with reading(path), open(path, "rb"):
        pass


def refuse_overwriting(inputs: Sequence[str | Path], outputs: Sequence[str | Path | None]) -> None:
    """Raises CorpusError for an output that is one of the input files (expanded), by whatever name; None is none."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if path is not None and os.path.realpath(path) in read:
            raise CorpusError(f"{path}: is among the inputs; write to another place")


def check_output(path: str | Path, flag: str = "") -> None:
    """Raises CorpusError, naming `flag`, where `path` cannot be written. Its folder is made if it is missing."""
    temporary = _temporary(path)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is a folder or a device")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "what should be its folder is a file" if is_file else error.strerror or error
        raise CorpusError(f"{flag} {path}: cannot be written: {reason}".lstrip()) from None


def _temporary(path: str | Path) -> Path:
    return Path(f"{path}.tmp-{os.getpid()}")


def split_ending(path: str) -> tuple[str, str]:
    """(ending that tells the format, ending of the compression or ""), both in lower case."""
    name = path.lower()
    compression = next((ending for ending in _COMPRESSIONS if name.endswith(ending)), "")
    return os.path.splitext(name.removesuffix(compression))[1], compression


def format_of(path: str) -> Format:
    """The format of a file by its ending; JSON lines where that says nothing."""
    ending, compression = split_ending(path)
    found = _FORMATS.get(ending, "jsonl")
    if found == "parquet" and compression:
        raise CorpusError(f"{path}: cannot be read: Parquet is compressed inside; unpack the {compression}")
    if ending in _NOT_READ:
        raise CorpusError(f"{path}: cannot be read: unpack it, or pack it as {' or '.join(_COMPRESSIONS)}")
    return found


def check_libraries(path: str) -> None:
    """Raise CorpusError where the file's format or compression needs a library that is not installed."""
    for ending in split_ending(path):
        for package in _NEEDS.get(ending, ()):
            require(package, f"{path}: a {ending} file")


def open_input(path: str) -> BinaryIO:
    """The file's bytes, decompressed. Reading raises OSError, EOFError or zlib.error where it is damaged or cut short
    (see `reading`); a compressed file of no bytes counts as cut short."""
    compression = split_ending(path)[1]
    if not compression:
        return open(path, "rb")
    if os.path.getsize(path) == 0:
        raise EOFError(f"a {compression} file of no bytes")
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return io.BufferedReader(_ZstdFile(path), 1 << 20)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Whatever goes wrong in reading `path` becomes a CorpusError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"{path}: cannot be read: {reason}") from None


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A file for bytes, compressed by the ending of `path`; it is written beside its place and renamed on a clean
    exit. The same bytes give the same file. After an exception nothing is left, and an old file stays.

    Raises CorpusError where it cannot be written, for a full disk too."""
    compression = split_ending(os.fspath(path))[1]
    check_output(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            if compression == ".gz":
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                    yield cast(BinaryIO, packed)
            elif compression == ".zst":
                with _zstandard().ZstdCompressor().stream_writer(file, closefd=False) as packed:
                    yield packed
            else:
                yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary):  # the caller's, of something else
            raise
        raise CorpusError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def require(package: str, what: str) -> ModuleType:
    """The optional package. Raises CorpusError saying how to install it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise CorpusError(
            f"{what} needs the package {package.partition('.')[0]}: pip install 'megatron_lite[data]'"
        ) from None


def _zstandard() -> ModuleType:
    return require("zstandard", "a .zst file")


class _ZstdFile(io.RawIOBase):
    """The content of all frames of a .zst file. (The library's own reader takes a file cut short for a whole one.)"""

    def __init__(self, path: str) -> None:
        self._library = _zstandard()
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close
        self._frame = self._new_frame()
        self._inside = False  # a frame that has not ended
        self._left = b""  # read from the file, not yet decompressed
        self._ready = memoryview(b"")
        self._position = 0

    def tell(self) -> int:
        return self._position

    def _new_frame(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._advance():
                return 0
        size = min(len(buffer), len(self._ready))
        self._position += size
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _advance(self) -> bool:
        """Decompress the next bytes; False at the end of the file."""
        data = self._left or self._file.read(_FEED)
        self._left = b""
        if not data:
            if self._inside:
                raise EOFError("the last zstd frame is cut short")
            return False
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except self._library.ZstdError as error:
            raise OSError(f"damaged zstd data: {error}") from None
        self._inside = not self._frame.eof
        if self._frame.eof:
            self._left = self._frame.unused_data
            self._frame = self._new_frame()
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
