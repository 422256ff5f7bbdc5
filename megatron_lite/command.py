"""How the tools end: an error is a line, and so is Ctrl-C."""

import functools
import os
import select
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
_STDOUT = 1


def command(interrupted: str | None = None) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """For the main of a tool: what it raises becomes an exit status.

    2 after a ValueError or OSError, which is printed; 130 after Ctrl-C; 141 where the reader of its output is gone
    (`head`, say, has seen enough), as of any program in a pipe: what it was asked for may not be done.

    interrupted: what to say of Ctrl-C: what is left, what to do
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                status = main(*args, **kwargs)
                sys.stdout.flush()
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError) and _reader_is_gone():
                    # Or Python would say it once more at its end.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
                    return 141
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                if interrupted:
                    print(f"interrupted: {interrupted}", file=sys.stderr)
                return 130
            return status

        return wrapped

    return decorate


def _reader_is_gone() -> bool:
    """Whether the pipe that broke is standard output; else it was one to a worker, which died."""
    output = select.poll()
    output.register(_STDOUT, 0)
    return bool(output.poll(0))
