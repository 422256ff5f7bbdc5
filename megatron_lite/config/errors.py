"""What is wrong with a configuration, said so that the user can repair it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class ConfigError(ValueError):
    """A configuration that cannot be used; `str()` is the whole message, one line a problem."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the key's path and what to change."""

    key: str
    message: str
    meant: str | None = None  # the key that was probably meant, which is then as good as wrong itself

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def raise_problems(source: str, problems: Iterable[Problem]) -> None:
    """Raise one `ConfigError` naming every problem (once each), or return when there is none."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if lines:
        raise ConfigError(
            "\n".join([f"{source}: {len(lines)} problem{'s' * (len(lines) > 1)}", *_indent(lines)])
        )


def _indent(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when none is near."""
    by_lower = {item.lower(): item for item in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def unknown_key(path: str, known: Iterable[str]) -> Problem:
    """The problem for an unknown key at `path`, with the nearest of its siblings `known`."""
    parent, _, name = path.rpartition(".")
    known = sorted(known)
    match = closest(name, known)
    if match:
        meant = f"{parent}.{match}" if parent else match
        return Problem(path, f"unknown key; did you mean {meant}?", meant)
    return Problem(path, f"unknown key; {parent or 'the top level'} takes {', '.join(known)}")


def touches(key: str, other: str) -> bool:
    """Whether one of two paths is the other, or lies in it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
