"""All rules in their order, over one document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_lite.corpus.cleaning.boilerplate import boilerplate_rule
from megatron_lite.corpus.cleaning.c4 import bad_words_rule, c4_rule
from megatron_lite.corpus.cleaning.gopher_quality import gopher_quality_rule
from megatron_lite.corpus.cleaning.gopher_repetition import gopher_repetition_rule
from megatron_lite.corpus.cleaning.language import language_rule
from megatron_lite.corpus.cleaning.page import Change, Drop, Page, Rule
from megatron_lite.corpus.cleaning.personal_data import personal_data_rule
from megatron_lite.corpus.cleaning.repair import (
    control_characters_rule,
    lowercase_rule,
    unicode_rule,
    whitespace_rule,
)
from megatron_lite.corpus.cleaning.settings import CleaningSettings, LengthSettings


def length_rule(settings: LengthSettings) -> Rule:
    """Drops what is too short or too long after everything else."""

    def rule(page: Page) -> Drop | None:
        length = len(page.text)
        if length < settings.min_characters:
            return Drop("min_characters", f"{length:,} characters, under {settings.min_characters:,}")
        if settings.max_characters is not None and length > settings.max_characters:
            return Drop("max_characters", f"{length:,} characters, over {settings.max_characters:,}")
        return None

    return rule


# Pages are judged as they came, with their encoding repaired, before lines are taken out of them (as FineWeb does).
_RULES: Mapping[str, Callable[[Any], Rule]] = {
    "unicode": unicode_rule,
    "control_characters": control_characters_rule,
    "whitespace": whitespace_rule,
    "language": language_rule,
    "gopher_quality": gopher_quality_rule,
    "gopher_repetition": gopher_repetition_rule,
    "boilerplate": boilerplate_rule,
    "c4": c4_rule,
    "bad_words": bad_words_rule,
    "personal_data": personal_data_rule,
    "lowercase": lowercase_rule,
    "length": length_rule,
}


class Outcome(NamedTuple):
    """What became of one document.

    text: None where it was dropped
    dropped: what dropped it ("RULE.THRESHOLD", with the measured figure); changes are empty then
    fields: to be added to its record
    """

    text: str | None
    dropped: Drop | None
    changes: list[Change]
    fields: dict[str, Any]


def build_rules(settings: CleaningSettings) -> list[tuple[str, Rule]]:
    """The enabled rules with their names, models and lists loaded.

    Raises CorpusError for a package or a list that is missing.
    """
    sections = ((name, build, getattr(settings, name)) for name, build in _RULES.items())
    return [(name, build(section)) for name, build, section in sections if section.enabled]


def clean_document(text: str, rules: Sequence[tuple[str, Rule]]) -> Outcome:
    """`text` through the rules, to the first that drops it."""
    page, changes, fields = Page(text), list[Change](), dict[str, Any]()
    for name, rule in rules:
        answer = rule(page)
        if isinstance(answer, Drop):
            return Outcome(None, Drop(f"{name}.{answer.check}", answer.reason), [], {})
        if answer is not None:
            changes += [
                change._replace(check=f"{name}.{change.check}".rstrip(".")) for change in answer.changes
            ]
            fields |= answer.fields
            if answer.text != page.text:
                page = Page(answer.text)
    if not page.text:
        return Outcome(None, Drop("empty", "no text left"), [], {})
    return Outcome(page.text, None, changes, fields)
