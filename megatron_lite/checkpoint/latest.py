"""Which checkpoint to take: the one that `latest` names, or the newest that is whole."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Generator
from pathlib import Path

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.files import write_atomically
from megatron_lite.checkpoint.index import INDEX
from megatron_lite.checkpoint.reader import Reader

log = logging.getLogger(__name__)

LATEST = "latest"
# A step being replaced by a new save of the same step is `.old` until the new one is in its place.
_STEP = re.compile(r"step_(\d+)(\.old)?$")


def step_of(folder: Path) -> int:
    """The step that the name of a step folder says."""
    match = _STEP.match(folder.name)
    assert match, f"{folder} is no step folder"
    return int(match[1])


def write_latest(folder: Path) -> None:
    """Point `latest` at a step folder beside it; the sum after the name tells damage from another step's name."""
    write_atomically(folder.parent / LATEST, f"{folder.name} {_sum_of(folder.name)}\n".encode())


def _read_latest(directory: Path) -> int | None:
    """The step that `latest` names, None where there is none; says so where it is damaged."""
    try:
        name, *rest = (directory / LATEST).read_bytes().decode("latin-1").split(" ")
    except OSError:
        return None
    if _STEP.match(name.strip()) and rest in ([], [f"{_sum_of(name)}\n"]):  # once it was the name alone
        return step_of(Path(name.strip()))
    log.warning("%s is damaged; the checkpoint of the highest step counts", directory / LATEST)
    return None


def _sum_of(name: str) -> str:
    return f"crc32:{zlib.crc32(name.encode()):08x}"


def step_folders(directory: Path) -> list[Path]:
    """The step folders of a checkpoints folder, the one to resume from first.

    That is the one `latest` names; then the older ones, newest first; then any newer than it (left by a run
    that was rewound, or by a save that was killed before it moved the pointer).
    """
    found = [path for path in directory.iterdir() if _STEP.match(path.name)]
    latest = _read_latest(directory)

    def order(path: Path) -> tuple[bool, int, str]:
        # What was replaced (.old) comes after what replaced it.
        return latest is not None and step_of(path) > latest, -step_of(path), path.name

    return sorted(found, key=order)


# Take what comes; or send what is wrong with it, which is told once, and the next best comes.
Search = Generator[Path, str | None, None]


def search_output(output_dir: str | Path, *, checksums: bool | str = False) -> Search:
    """What `find_latest` finds, then what it would find were that damaged, and so on. Raises as it does."""
    directory = Path(output_dir)
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    if not directory.is_dir():
        return
    faults: list[str] = []
    for folder in step_folders(directory):
        try:
            _open(folder, checksums)
        except CheckpointError as error:
            fault: str | None = str(error)
        else:
            if faults:
                log.warning("falling back to checkpoint %s", folder)
            fault = yield folder
        if fault is not None:
            log.warning("checkpoint %s cannot be used: %s", folder.name, fault)
            faults.append(fault)
    if faults:
        remedy = "restore one, or move them away to start afresh"
        raise CheckpointError(f"{directory}: no checkpoint is whole ({'; '.join(faults)}); {remedy}")


def find_latest(output_dir: str | Path, *, checksums: bool | str = False) -> Path | None:
    """The newest whole checkpoint under an output directory (or a checkpoints folder), None where none is.

    Falls back to an older one where the newest is damaged, with a warning that says what was wrong with it.
    `checksums` reads every byte, or those of the kind that it names ("weight"), instead of looking at sizes only.
    Raises CheckpointError where there are checkpoints and all are damaged: starting afresh is then for the user to
    decide. In a run of many ranks let one rank look and tell the others.
    """
    return next(search_output(output_dir, checksums=checksums), None)


def search(path: str | Path, *, checksums: bool | str = False) -> Search:
    """What `resolve` finds, then what it would find were that damaged, and so on. Raises as it does."""
    path = Path(path)
    if _STEP.match(path.name) or (path / INDEX).is_file():
        _open(path, checksums)
        if (fault := (yield path)) is not None:
            raise CheckpointError(fault)
        return
    yield from search_output(path, checksums=checksums)
    # What `checkpoint.weights_interval` saves; never taken unasked, since training does not go on from it.
    light = f" (weights alone are in {path / 'weights'})" if (path / "weights").is_dir() else ""
    raise CheckpointError(f"{path}: no checkpoint there{light}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    """What to give instead of a folder without a checkpoint, by what else it holds."""
    importing = f"import it with tools/convert_checkpoint.py --load {path} --save DIR --to megatron_lite, and give DIR"
    if any(path.glob("*.safetensors")) and (path / "config.json").is_file():
        return f"it is a Hugging Face model: {importing}"
    if any(path.glob("*.safetensors")) and (path / "model_config.json").is_file():
        exported = (
            "it holds weights for other programs, as tools/convert_checkpoint.py --to safetensors writes them"
        )
        return f"{exported}, which are not read back: give the checkpoint that they came from"
    # Of Megatron-LM; of DeepSpeed, its universal ones first; of either's single steps.
    foreign = (
        "latest_checkpointed_iteration.txt",
        "latest_universal",
        "mp_rank_00*",
        "*/mp_rank_00*",
        ".metadata",
    )
    if any(any(path.glob(marker)) for marker in foreign):
        return f"it is a Megatron-LM or DeepSpeed checkpoint: {importing}"
    return "give a step folder or a run's output directory"


def resolve(path: str | Path, *, checksums: bool | str = False) -> Path:
    """The step folder meant by `path`: one itself, a checkpoints folder or an output directory.

    Raises CheckpointError where there is no checkpoint, or none that is whole (see `find_latest`).
    """
    return next(search(path, checksums=checksums))


def _open(folder: Path, checksums: bool | str) -> None:
    with Reader(folder) as reader:
        if checksums:
            reader.verify(kind=None if checksums is True else checksums)
