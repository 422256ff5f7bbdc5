"""The output folder: that it can be written, and that one run at a time does."""

import fcntl
import logging
import os
import socket
import tempfile
from pathlib import Path

from megatron_lite.config import Config
from megatron_lite.training.saver import WEIGHTS_FOLDER
from megatron_lite.training.saving import FOLDER

logger = logging.getLogger(__name__)

LOCK = "run.lock"


class Output:
    """The first rank's hold on the run's output folder; the other ranks have one that does nothing.

    Two runs in one folder would remove each other's unfinished saves and mix their metrics. The system lets go of the
    folder when the process ends, however it does, so that the file which stays says nothing by itself.

    Args:
        active: this is the first rank.

    Raises:
        ValueError: the folder, or one in it that checkpoints go to, cannot be written; another run writes there.
    """

    def __init__(self, config: Config, active: bool) -> None:
        self._folder = Path(config.train.output_dir)
        self._lock: int | None = None
        if not active:
            return
        weights = config.checkpoint.weights_interval is not None
        self._check([FOLDER] + [WEIGHTS_FOLDER] * weights)
        self._hold()

    def _check(self, names: list[str]) -> None:
        """Now, not hours later at the first save."""
        folder = self._folder
        below = [folder / name for name in names]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for folder in (self._folder, *filter(os.path.lexists, below)):
                tempfile.TemporaryFile(dir=folder).close()  # permissions do not tell, as on a read-only disk
        except OSError as error:
            raise ValueError(f"train.output_dir: cannot write in {folder}: {error.strerror}") from error

    def _hold(self) -> None:
        path = self._folder / LOCK
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(f"train.output_dir: cannot write {path}: {error.strerror}") from error
        try:
            # Not flock: a lock of that kind is also that of every process forked from this one, and would stay while
            # one of them outlives it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(self._lock, 1000).decode(errors="replace").strip() or "a process"
            self.close()
            raise ValueError(
                f"train.output_dir: another run writes in {self._folder} ({holder}); wait for its end, stop it, or set "
                "another folder"
            ) from error
        except OSError as error:
            logger.info(
                "%s: this file system has no locks (%s), so a second run in the same folder would not be noticed",
                *(self._folder, error.strerror),
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
