"""Lines around the text of a page: Penedo et al. 2023, "The RefinedWeb Dataset", appendix G.2 (line-wise filtering).

The paper names the kinds of lines and the 5%; which phrases, and how much upper case is much, is ours.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from megatron_lite.corpus.cleaning.page import Change, Drop, Edit, Page, Rule
from megatron_lite.corpus.cleaning.settings import BoilerplateSettings

_COUNTER = re.compile(r"[\d.,]+[kKmM]?\s+[^\W\d_]+")
_UPPER, _LOWER = string.ascii_uppercase.encode(), string.ascii_lowercase.encode()


def boilerplate_rule(settings: BoilerplateSettings) -> Rule:
    """Removes the lines that the switches name; drops a text of which they are too large a share."""
    unwanted = _judge(settings)

    def rule(page: Page) -> Drop | Edit | None:
        kept, removed, removed_words = [], Counter[str](), 0
        for line in page.text.split("\n"):
            words = len(line.split())
            check = unwanted(line.strip(), words) if words else None
            if check is None:
                kept.append(line)
            else:
                removed[check] += 1
                removed_words += words
        if not removed:
            return None
        share = removed_words / len(page.words)
        if settings.max_removed_words is not None and share > settings.max_removed_words:
            reason = f"{share:.3g} of the words in boilerplate lines, over {settings.max_removed_words:.3g}"
            return Drop("max_removed_words", reason)
        changes = [Change(check, count, "lines removed") for check, count in sorted(removed.items())]
        return Edit("\n".join(kept).strip("\n"), changes, {})

    return rule


def _judge(settings: BoilerplateSettings) -> Callable[[str, int], str | None]:
    """From a line and the number of its words to the first switch that removes it."""
    phrases = {
        "starts": _any_of(settings.starts, r"^(?:{})\b"),
        "ends": _any_of(settings.ends, r"(?<!\w)(?:{})[\s.!…]*$"),
        "anywhere": _any_of(settings.anywhere, r"(?<!\w)(?:{})(?!\w)"),
    }

    def unwanted(line: str, words: int) -> str | None:
        if settings.single_words and words == 1:
            return "single_words"
        if settings.counters and _COUNTER.fullmatch(line):
            return "counters"
        if settings.numbers and not line[-1].isalpha() and _is_number(line):
            return "numbers"
        if settings.max_uppercase is not None and uppercase_share(line) > settings.max_uppercase:
            return "max_uppercase"
        if words > settings.max_phrase_words:
            return None
        return next((name for name, phrase in phrases.items() if phrase and phrase.search(line)), None)

    return unwanted


def _any_of(phrases: tuple[str, ...], where: str) -> re.Pattern[str] | None:
    """None for no phrases: an empty alternation matches everywhere."""
    if not phrases:
        return None
    return re.compile(where.format("|".join(map(re.escape, phrases))), re.IGNORECASE)


def _is_number(line: str) -> bool:
    return any(map(str.isdigit, line)) and not any(map(str.isalpha, line))


def uppercase_share(line: str) -> float:
    """Upper-case letters among those that have a case; 0 where none has."""
    if line.isascii():
        data = line.encode()
        upper, lower = (len(data) - len(data.translate(None, letters)) for letters in (_UPPER, _LOWER))
    else:
        upper, lower = sum(map(str.isupper, line)), sum(map(str.islower, line))
    return upper / max(upper + lower, 1)
