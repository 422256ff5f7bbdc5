"""How the tools end: an error is a line, and so is Ctrl-C."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


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
            except BrokenPipeError:
                # Or Python would say it once more at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                if interrupted:
                    print(f"interrupted: {interrupted}", file=sys.stderr)
                return 130
            return status

        return wrapped

    return decorate
