"""What tests of the saver share."""

from typing import Any

import pytest

from megatron_lite.checkpoint import CheckpointError
from megatron_lite.training import saver as saver_module
from megatron_lite.training.saver import Saver
from megatron_lite.training.saving import Progress


def progress(step: int) -> Progress:
    return Progress(step, step * 8, step * 128)


def logged(level: str) -> list[str]:
    """What the saver of this process says from now on."""
    messages: list[str] = []

    def note(message: str, *args: Any) -> None:
        messages.append(message % args)

    setattr(saver_module.logger, level, note)
    return messages


def failure_of(saver: Saver) -> tuple[str, bool]:
    """Why the save in the background failed, and whether that was known before it was waited for."""
    assert saver._thread is not None
    saver._thread.join(60)
    failed = saver.failed
    with pytest.raises(CheckpointError) as error:
        saver.wait()
    return str(error.value), failed
