"""Repetition rules of Gopher's MassiveWeb: Rae et al. 2021, appendix A.1.1 and table A1.

What the paper leaves open is taken as most reimplementations do. A line, paragraph or n-gram is a duplicate from its
second occurrence on; one that occurs once is no repetition. Characters of n-grams are those of their words, without
the spaces. Of the most frequent n-gram every occurrence counts, of equally frequent ones the longest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus.cleaning.page import Drop, Page, Rule
from megatron_lite.corpus.cleaning.settings import GopherRepetitionSettings

Integers = NDArray[np.int64]
_BLANK = re.compile(r"\n\s*\n")
_TOP, _DUPLICATE = range(2, 5), range(5, 11)  # lengths of n-grams


def gopher_repetition_rule(settings: GopherRepetitionSettings) -> Rule:
    """Drops a text at the first share that is over its threshold."""

    def rule(page: Page) -> Drop | None:
        for name, share in repetition(page):
            limit = getattr(settings, name)
            if limit is not None and share > limit:
                return Drop(name, f"{share:.3g} {name.replace('_', ' ')}, over {limit:.3g}")
        return None

    return rule


def repetition(page: Page) -> Iterator[tuple[str, float]]:
    """(threshold's name, share of the text from 0 to 1), one after the other as they are found."""
    paragraphs = [part for part in map(str.strip, _BLANK.split(page.text)) if part]
    for name, pieces in (("line", page.lines), ("paragraph", paragraphs)):
        number, characters = _duplicates(pieces)
        yield f"duplicate_{name}s", number / max(len(pieces), 1)
        yield f"duplicate_{name}_characters", characters / max(sum(map(len, pieces)), 1)
    yield from _ngram_repetition(page.words)


def _duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces came before, and their characters."""
    unique = set(pieces)
    if len(unique) == len(pieces):
        return 0, 0
    return len(pieces) - len(unique), sum(map(len, pieces)) - sum(map(len, unique))


def _ngram_repetition(words: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The shares of n-grams. An (n+1)-gram is repeated only where the n-gram in it is, so that each length looks
    at what the one before has left, which in ordinary text soon is nothing."""
    numbers = defaultdict[str, int](count().__next__)
    ids = np.fromiter(map(numbers.__getitem__, words), dtype=np.int64, count=len(words))
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    ends = np.concatenate(([0], np.cumsum(lengths)))  # characters before each word
    total = max(int(ends[-1]), 1)
    places = np.arange(len(words))  # where an n-gram begins that may be repeated
    group = ids  # equal for equal n-grams at these places
    for n in range(2, _DUPLICATE.stop):
        inside = places + n <= len(words)
        places, group = places[inside], group[inside]
        # Exact, not a hash: both factors are below the number of words.
        group, counts, first = _groups(group * len(numbers) + ids[places + n - 1])
        if n in _TOP:
            characters = ends[places + n] - ends[places]
            top = _top_characters(group, counts, characters)
            yield f"top_{n}gram", min(top / total, 1.0)
        if n in _DUPLICATE:
            yield f"duplicate_{n}grams", _covered(places[~first], n, lengths) / total
        repeated = counts[group] > 1
        places, group = places[repeated], group[repeated]


def _groups(keys: Integers) -> tuple[Integers, Integers, NDArray[np.bool_]]:
    """(a number from 0 for each distinct key, how often each occurs, whether it is a key's first occurrence)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = np.cumsum(new) - 1
    first = np.empty(len(keys), dtype=bool)
    first[order] = new
    return numbers, np.bincount(numbers), first


def _top_characters(group: Integers, counts: Integers, characters: Integers) -> int:
    """Characters in all occurrences of the most frequent n-gram; 0 where none occurs twice."""
    if not len(counts) or counts.max() < 2:
        return 0
    return int(counts.max() * characters[counts[group] == counts.max()].max())


def _covered(places: Integers, n: int, lengths: Integers) -> int:
    """Characters of the words inside n-grams that begin at `places`, each word once."""
    covered = np.zeros(len(lengths), dtype=bool)
    for offset in range(n):
        covered[places + offset] = True
    return int(lengths[covered].sum())
