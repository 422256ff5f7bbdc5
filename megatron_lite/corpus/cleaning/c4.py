"""The rules of C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2, and its published
code. Sentences are counted by their final punctuation, where the code asks a trained model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_lite.corpus.cleaning.page import Change, Drop, Edit, Page, Rule
from megatron_lite.corpus.cleaning.settings import BadWordsSettings, C4Settings
from megatron_lite.corpus.reader import CorpusError

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_TERMINAL = (".", "!", "?", '"', "”")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)""")
_WORD = re.compile(r"\w+")


def c4_rule(settings: C4Settings) -> Rule:
    """Drops pages, or removes the citation marks and lines that the switches name. Blank lines stay."""

    def rule(page: Page) -> Drop | Edit | None:
        lower = page.text.lower()
        if settings.lorem_ipsum and "lorem ipsum" in lower:
            return Drop("lorem_ipsum", 'holds "lorem ipsum"')
        if settings.curly_bracket and "{" in lower:
            return Drop("curly_bracket", 'holds "{"')
        text, citations = page.text, 0
        if settings.citations and "[" in text:
            text, citations = _CITATION.subn("", text)
        kept, removed, sentences = [], Counter[str](), 0
        for line in text.split("\n"):
            check = _unwanted(line.strip(), settings) if line.strip() else None
            if check is not None:
                removed[check] += 1
                continue
            kept.append(line)
            sentences += count_sentences(line)
        if settings.min_sentences is not None and sentences < settings.min_sentences:
            lines = f" after removing {removed.total():,} lines" if removed else ""
            return Drop("min_sentences", f"{sentences} sentences{lines}, under {settings.min_sentences}")
        changes = [Change(check, count, "lines removed") for check, count in sorted(removed.items())]
        if citations:
            changes.append(Change("citations", citations, "citation marks removed"))
        return Edit("\n".join(kept).strip("\n"), changes, {}) if changes else None

    return rule


def _unwanted(line: str, settings: C4Settings) -> str | None:
    """The first switch that removes this line, in the published code's order."""
    words = line.split()
    longest = settings.max_word_length
    if longest is not None and len(line) > longest and max(map(len, words)) > longest:
        return "max_word_length"
    if settings.terminal_punctuation and (not line.endswith(_TERMINAL) or line.endswith("...")):
        return "terminal_punctuation"
    if settings.min_line_words is not None and len(words) < settings.min_line_words:
        return "min_line_words"
    lower = line.lower()
    if settings.javascript_lines and "javascript" in lower:
        return "javascript_lines"
    if settings.policy_lines and any(policy in lower for policy in _POLICIES):
        return "policy_lines"
    return None


def count_sentences(line: str) -> int:
    """Sentences of a line by their final punctuation; one where there is none, none where it is blank."""
    return max(len(_SENTENCE_END.findall(line)), 1) if line.strip() else 0


def bad_words_rule(settings: BadWordsSettings) -> Rule:
    """Drops a text that holds an entry of the lists, whatever its case.

    Raises CorpusError where there is no list, or one that cannot be read.
    """
    holds = _matcher(_entries(settings.files), settings.whole_words)

    def rule(page: Page) -> Drop | None:
        entry = holds(page.text.lower())
        # The report counts and does not repeat the word.
        return None if entry is None else Drop("files", f"holds an entry of {len(entry)} characters")

    return rule


def _entries(files: tuple[str, ...]) -> list[str]:
    if not files:
        raise CorpusError("bad_words is enabled without a list: name one in bad_words.files")
    entries: set[str] = set()
    for path in files:
        try:
            lines = Path(path).read_text(encoding="utf-8").lower().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: bad-word list cannot be read: {error}") from None
        entries.update(line for line in map(str.strip, lines) if line)
    if not entries:
        raise CorpusError(f"{', '.join(files)}: no bad words there, one a line expected")
    return sorted(entries)


def _matcher(entries: list[str], whole_words: bool) -> Callable[[str], str | None]:
    """The first entry in a lower-case text. With `whole_words` only between characters that are no word's."""
    if not whole_words:
        return lambda text: next((entry for entry in entries if entry in text), None)
    # One alternation of hundreds of entries is tried at every place: ask first which entries can be there at all.
    by_word: dict[str, list[str]] = {}
    for entry in entries:
        first = _WORD.search(entry)
        by_word.setdefault(first[0] if first else "", []).append(entry)

    def search(text: str) -> str | None:
        possible = by_word.keys() & {"", *_WORD.findall(text)}
        for entry in sorted(entry for word in possible for entry in by_word[word]):
            if re.search(rf"(?<!\w){re.escape(entry)}(?!\w)", text):
                return entry
        return None

    return search
