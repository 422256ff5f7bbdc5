"""Every rule between keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from . import model_rules, run_rules
from .errors import Problem, touches
from .rulebook import RULES
from .tree import Config

__all__ = ["check_rules", "model_rules", "run_rules"]  # importing the two registers their rules


def check_rules(config: Config, broken: Collection[str] = ()) -> Iterator[Problem]:
    """Every rule that `config` breaks, leaving out the rules that read a key in `broken`."""
    for keys, check in RULES:
        if not any(touches(key, bad) for key in keys for bad in broken):
            yield from check(config)
