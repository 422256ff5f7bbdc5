"""What a cleaning rule is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple


class Page:
    """A document's text, divided once for all the rules that look at its parts."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without the spaces around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]


class Drop(NamedTuple):
    """The document goes: the threshold that it missed, and by how much."""

    check: str
    reason: str


class Change(NamedTuple):
    """What was done to a text: `amount` of `unit` ("lines removed"), under the rule's switch `check`."""

    check: str
    amount: int
    unit: str


class Edit(NamedTuple):
    """The document stays with this text, and with these fields added to its record."""

    text: str
    changes: list[Change]
    fields: dict[str, Any]


Rule = Callable[[Page], Drop | Edit | None]
"""None: the rule has nothing to say about this text."""
