"""How rules between keys are written down: each names the keys it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .errors import Problem
from .tree import Config

Check = Callable[[Config], Iterator[Problem]]
RULES: list[tuple[tuple[str, ...], Check]] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Register a check that reads `keys`."""

    def register(check: Check) -> Check:
        RULES.append((keys, check))
        return check

    return register
