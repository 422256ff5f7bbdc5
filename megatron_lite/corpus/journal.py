"""What an interrupted run has finished, so that the same command goes on from there.

PREFIX.journal.partial is JSON lines: what the run is (inputs, settings), then one state after the other, each written
when all it speaks of is on disk. The last whole line counts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lite.corpus.files import CorpusError

logger = logging.getLogger(__name__)


class Journal:
    """The journal of one output prefix, held by one process.

    last: the state that an earlier run of the same `identity` left; None where there is none

    Raises CorpusError where another process writes there.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], identity: dict[str, Any], restart: bool = False
    ) -> None:
        self.path = Path(os.fspath(prefix) + ".journal.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise CorpusError(
                f"{self.path}: another process is writing there; wait for it, or take another prefix"
            ) from None
        except OSError:
            logger.warning("%s: this file system has no locks: run one process at a time", self.path)
        self.last = None if restart else self._read(identity)
        if self.last is None:
            self._file.truncate(0)
            self.add(identity)

    def _read(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line that was cut short does not count
        if not whole:
            return None
        try:
            first, *states = map(json.loads, whole.splitlines())
        except ValueError:
            logger.warning("%s: damaged: starting anew", self.path)
            return None
        differing = [key for key in identity if first.get(key) != json.loads(json.dumps(identity[key]))]
        if differing:
            logger.warning(
                "%s: of an interrupted run with other %s: starting anew", self.path, ", ".join(differing)
            )
            return None
        self._file.truncate(len(whole))
        return states[-1] if states else None

    def add(self, state: dict[str, Any]) -> None:
        """Write a state; returns when it is on disk."""
        self._file.write(json.dumps(state).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Everything is in place, or given up."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
