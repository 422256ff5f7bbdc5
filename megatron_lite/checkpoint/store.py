"""Saving: every rank its own file, one index, one rename.

`DIRECTORY/step_00000100/` holds `rank_00000.safetensors` … and `index.json`; `DIRECTORY/latest` names the
step to resume from. All of it is written in `step_00000100.tmp` and fsynced before the folder gets its name,
so that a kill at any moment leaves what was there before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import DTYPE_NAMES, fsync_directory, write_safetensors
from megatron_lite.checkpoint.index import (
    FileEntry,
    Index,
    entry_from_text,
    entry_to_text,
    key_of,
    write_index,
)
from megatron_lite.checkpoint.latest import step_folders, step_of, write_latest
from megatron_lite.checkpoint.layout import Piece, check_coverage, stored
from megatron_lite.checkpoint.reader import Reader

T = TypeVar("T")
log = logging.getLogger(__name__)


def save(
    directory: str | Path,
    step: int,
    pieces: Iterable[Piece],
    metadata: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[object], list[Any]] = lambda value: [value],
    keep: int = 0,
) -> Path:
    """Write a checkpoint of `step` under `directory` (the run's checkpoints folder) and return its folder.

    Collective: every rank calls it with the pieces that it holds, which together must be every parameter
    exactly once, and all ranks see one file system. `gather` gives every rank the list of all ranks' values,
    in rank order (torch.distributed.all_gather_object). `metadata` is rank 0's and must be JSON. The `keep`
    newest whole checkpoints up to this one stay (0: all). What fails on one rank (a full disk, pieces that do
    not add up) raises CheckpointError on every rank, and the checkpoints already there are as they were.
    """
    directory = Path(directory)
    final = directory / f"step_{step:08d}"
    temporary = final.with_name(final.name + ".tmp")

    def together(phase: str, action: Callable[[], T]) -> list[T]:
        """Do one phase on this rank; all ranks' results, or an error on all ranks where any failed."""
        result, cause = None, None
        try:
            result = action()
        except Exception as error:  # whatever it is, the other ranks are waiting for word of it
            cause = error
        reports = gather(
            (result, None if cause is None else f"rank {rank}: {str(cause) or type(cause).__name__}")
        )
        assert len(reports) == world_size, "gather must give every rank the values of all ranks"
        if faults := [fault for _, fault in reports if fault]:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk should not stay full
            more = f" (and {len(faults) - 3} more ranks)" if len(faults) > 3 else ""
            fault = "; ".join(faults[:3]) + more
            remedy = "earlier checkpoints are as they were"
            raise CheckpointError(f"{final} was not saved: {phase}: {fault}; {remedy}") from cause
        return [value for value, _ in reports]

    together("preparing the folder", lambda: _prepare(temporary, metadata) if rank == 0 else None)
    # As text, which the ranks that have no use for it need not make objects of.
    texts = together("writing the pieces", lambda: entry_to_text(_write_rank(temporary, rank, pieces)))

    def publish() -> None:
        _publish(temporary, final, Index(step, metadata, [entry_from_text(text) for text in texts]))
        _tidy(final, keep)

    together("publishing", lambda: publish() if rank == 0 else None)
    return final


def save_files(target: Path, step: int, files: list[list[Piece]], metadata: dict[str, Any]) -> Path:
    """Write a checkpoint of many ranks' files from one process, one after the other; its step folder.

    It is under `target`/checkpoints, as a run's would be, and `latest` names it.

    Raises:
        CheckpointError: checkpoints are there already, the disk has too little room, pieces do not add up.
        OSError: the disk refuses. Nothing is left then.
    """
    directory = target / "checkpoints"
    final = directory / f"step_{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    check_unused(target)
    size = sum(piece.data.numel() * piece.data.dtype.itemsize for pieces in files for piece in pieces)
    _prepare(temporary, metadata)
    try:
        check_room(directory, size)
        entries = [_write_rank(temporary, number, pieces) for number, pieces in enumerate(files)]
        _publish(temporary, final, Index(step, metadata, entries))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk should not stay full
        with contextlib.suppress(OSError):
            directory.rmdir()
        raise
    return final


def check_unused(target: Path) -> None:
    """Raise CheckpointError where `target`/checkpoints holds checkpoints."""
    directory = target / "checkpoints"
    if directory.is_dir() and step_folders(directory):
        raise CheckpointError(f"{directory} holds checkpoints already; give another folder")


def check_room(folder: Path, size: int) -> None:
    """Raise CheckpointError where the disk of a folder has less than `size` bytes free."""
    if size > (free := shutil.disk_usage(folder).free):
        raise CheckpointError(
            f"{folder}: {size / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are free"
        )


def _prepare(temporary: Path, metadata: dict[str, Any]) -> None:
    """Make the folder to write in, and remove what killed saves have left."""
    json.dumps(metadata, allow_nan=False)  # before gigabytes are written, not after
    directory = temporary.parent
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        fsync_directory(directory.parent)
    for leftover in directory.glob("step_*.tmp"):
        try:
            shutil.rmtree(leftover)
        except OSError as error:
            if leftover == temporary:
                raise
            log.warning("%s could not be removed: %s", leftover, error)  # it is in nobody's way
    temporary.mkdir()


def _write_rank(folder: Path, rank: int, pieces: Iterable[Piece]) -> FileEntry:
    """Write one rank's file."""
    held, tensors = {}, {}
    for piece in pieces:
        if piece.data.numel() == 0:
            continue  # ZeRO's padding leaves some ranks with nothing of a parameter
        if piece.data.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"piece of {piece.name} ({piece.kind}): {piece.data.dtype} cannot be stored"
            )
        entry = stored(piece, DTYPE_NAMES[piece.data.dtype])
        if key_of(entry) in held:
            raise CheckpointError(f"piece of {piece.name} ({piece.kind}) is given twice")
        held[key_of(entry)], tensors[key_of(entry)] = entry, piece.data
    file = f"rank_{rank:05d}.safetensors"
    return FileEntry(file, held, write_safetensors(folder / file, tensors, {"format": "pt"}))


def _publish(temporary: Path, final: Path, index: Index) -> None:
    """Index the files, give the folder its name and point `latest` at it."""
    check_coverage(piece for entry in index.files for piece in entry.pieces.values())
    write_index(temporary, index)
    replaced = _replaced(final)
    if final.exists():
        if replaced.exists():
            _remove(replaced)
        os.replace(final, replaced)
    try:
        os.replace(temporary, final)
    except OSError:
        if replaced.exists():
            os.replace(replaced, final)
        raise
    fsync_directory(final.parent)
    write_latest(final)


def _replaced(folder: Path) -> Path:
    """The name of a step folder while a new save of its step takes its place."""
    return folder.with_name(folder.name + ".old")


def _tidy(final: Path, keep: int) -> None:
    """Remove what the save of `final` replaced, or one before that was killed, and what is no longer kept."""
    try:
        for folder in step_folders(final.parent):
            if _replaced(folder).exists():
                _remove(_replaced(folder))
        if keep:
            _retain(final, keep)
    except OSError as error:  # the save itself is done
        log.warning("checkpoints that are no longer kept could not be removed: %s", error)


def _retain(newest: Path, keep: int) -> None:
    """Remove the checkpoints older than the `keep` newest whole ones; steps after `newest` are not ours."""
    older = [path for path in step_folders(newest.parent) if step_of(path) <= step_of(newest)]
    whole = 0
    for path in older:
        if whole >= keep:
            _remove(path)
            continue
        try:
            Reader(path).close()
            whole += 1
        except CheckpointError:
            continue  # does not count; goes when `keep` newer ones are whole


def _remove(folder: Path) -> None:
    """Remove a step folder: first its name, so that half of it is never taken for a checkpoint."""
    doomed = folder.with_name(folder.name + ".tmp")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
