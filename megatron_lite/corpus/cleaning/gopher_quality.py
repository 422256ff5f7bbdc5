"""Quality rules of Gopher's MassiveWeb: Rae et al. 2021, "Scaling Language Models", appendix A.1.1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_lite.corpus.cleaning.page import Drop, Page, Rule
from megatron_lite.corpus.cleaning.settings import GopherQualitySettings

_LETTER = re.compile(r"[^\W\d_]")
_ELLIPSES = ("...", "…")
_EDGES = ".,;:!?…()[]{}\"'“”‘’«»*_-–—"


class _Measure(NamedTuple):
    name: str  # of the thresholds min_NAME and max_NAME
    value: float


def gopher_quality_rule(settings: GopherQualitySettings) -> Rule:
    """Drops a text outside the first range that it misses; a value on the threshold is inside."""
    stop_words = frozenset(word.lower() for word in settings.stop_words)
    bullets = tuple(settings.bullets)

    def rule(page: Page) -> Drop | None:
        for name, value in _measures(page, stop_words, bullets):
            low, high = getattr(settings, f"min_{name}", None), getattr(settings, f"max_{name}", None)
            shown = f"{value:,.4g} {name.replace('_', ' ')}"
            if low is not None and value < low:
                return Drop(f"min_{name}", f"{shown}, under {low:,}")
            if high is not None and value > high:
                return Drop(f"max_{name}", f"{shown}, over {high:,}")
        return None

    return rule


def _measures(page: Page, stop_words: frozenset[str], bullets: tuple[str, ...]) -> Iterator[_Measure]:
    """In the paper's order; ratios of an empty text are zero."""
    words, lines, text = page.words, page.lines, page.text
    word_count, line_count = max(len(words), 1), max(len(lines), 1)
    yield _Measure("words", len(words))
    yield _Measure("mean_word_length", sum(map(len, words)) / word_count)
    yield _Measure("hashes_per_word", text.count("#") / word_count)
    yield _Measure("ellipses_per_word", sum(map(text.count, _ELLIPSES)) / word_count)
    yield _Measure("bullet_lines", sum(line.startswith(bullets) for line in lines) / line_count)
    yield _Measure("ellipsis_lines", sum(line.endswith(_ELLIPSES) for line in lines) / line_count)
    # Most words are letters alone, which is known without a search.
    mixed = [word for word in words if not word.isalpha()]
    alphabetic = len(words) - len(mixed) + sum(_LETTER.search(word) is not None for word in mixed)
    yield _Measure("alphabetic_words", alphabetic / word_count)
    yield _Measure("stop_words", len(stop_words & {word.strip(_EDGES).lower() for word in set(words)}))
