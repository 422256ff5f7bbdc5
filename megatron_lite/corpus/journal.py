"""What an interrupted run has finished, so that the same command goes on from there.

PREFIX.journal.partial is JSON lines: what the run is (inputs, settings), then one state after the other, each written
when all it speaks of is on disk. The last whole line counts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megatron_lite.corpus.files import CorpusError

logger = logging.getLogger(__name__)


class Journal:
    """The journal of one output prefix, held by one process.

    last: the state that an earlier run of the same `identity` left; None where there is none

    Raises CorpusError where another process writes there, or an earlier run of another identity has left work undone,
    unless `restart`.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], identity: dict[str, Any], restart: bool = False
    ) -> None:
        self.path = Path(os.fspath(prefix) + ".journal.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        try:
            self.last = None if restart else self._read(identity)
            if self.last is None:
                self._file.truncate(0)
                self.add(identity)
        except BaseException:
            self._file.close()
            raise

    def _locked(self) -> BinaryIO:
        while True:
            file = open(self.path, "a+b")  # noqa: SIM115 - closed by __exit__
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise CorpusError(
                    f"{self.path}: another process is writing there; wait for it, or take another prefix"
                ) from None
            except OSError:
                logger.warning("%s: this file system has no locks: run one process at a time", self.path)
            try:
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            file.close()  # a run that ended between open and lock has removed it: the lock holds nobody off

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
        if not states:
            return None
        differences = _differences(first, json.loads(json.dumps(identity)))
        if differences:
            raise CorpusError(
                f"{self.path}: of an interrupted run that differs: {'; '.join(differences)}. Give that run's command "
                "to finish it, --restart to lose what it has done, or another prefix"
            )
        self._file.truncate(len(whole))
        return states[-1]

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


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """In words, of two values out of JSON; of lists the first one alone."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {**before, **now}
        return [text for key in keys for text in _differences(before.get(key), now.get(key), key)]
    if isinstance(before, list) and isinstance(now, list):
        before, now = next(pair for pair in zip_longest(before, now) if pair[0] != pair[1])
    return [f"{name} was {before} and is {now}"]
