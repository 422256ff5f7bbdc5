"""The settings of every cleaning rule, from one JSON file. Defaults are the published thresholds.

A section is one rule with its thresholds; `enabled` switches the rule, and null switches one threshold off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from megatron_lite.config.base import Section
from megatron_lite.config.errors import Problem, raise_problems, unknown_key
from megatron_lite.config.load import Tree, read_json

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(min_length=1)]


class UnicodeSettings(Section):
    """ftfy's repairs, and Unicode normalisation."""

    enabled: bool = True
    repair_encoding: bool = True  # UTF-8 that was read as another encoding ("cafÃ©"), C1 controls
    unescape_html: bool = True  # "&eacute;", in texts that hold no "<"
    ligatures: bool = True  # "ﬁ" becomes "fi"
    character_width: bool = (
        False  # full-width Latin to ASCII; it also changes the commas of Chinese and Japanese
    )
    straight_quotes: bool = False  # “ ” ‘ ’ to " and '
    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = "NFC"


class ControlCharactersSettings(Section):
    """Terminal escapes, controls but tab and line feed, soft hyphens, byte order marks, U+FFFD; line ends."""

    enabled: bool = True


class WhitespaceSettings(Section):
    enabled: bool = True
    inner_runs: bool = True  # runs of spaces inside a line to one; off for code and tables
    line_ends: bool = True  # spaces at the ends of lines go
    blank_lines: bool = True  # at most one in a row, none at either end


class LanguageSettings(Section):
    """py3langid's most likely language, with its probability among all it knows."""

    enabled: bool = True
    allowed: tuple[Word, ...] = ("en",)  # ISO 639-1; empty: any
    min_probability: Share = 0.65  # as RefinedWeb and FineWeb
    characters: Annotated[int, Field(ge=1)] = (
        1000  # judged by that many from the middle; the slowest rule by far
    )
    store: Word | None = None  # field for the language; its probability goes to FIELD_probability


class GopherQualitySettings(Section):
    """Rae et al. 2021, appendix A.1.1. Words are what stands between white space."""

    enabled: bool = True
    min_words: Count | None = 50
    max_words: Count | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_hashes_per_word: float | None = 0.1
    max_ellipses_per_word: float | None = 0.1
    max_bullet_lines: Share | None = 0.9
    max_ellipsis_lines: Share | None = 0.3
    min_alphabetic_words: Share | None = 0.8
    min_stop_words: Count | None = 2  # of the list, each counted once
    stop_words: tuple[Word, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    bullets: tuple[Word, ...] = ("•", "‣", "▪", "◦", "●", "■", "-", "*", "–")


class GopherRepetitionSettings(Section):
    """Rae et al. 2021, table A1: the largest share of a text that may be repetition."""

    enabled: bool = True
    duplicate_lines: Share | None = 0.30
    duplicate_paragraphs: Share | None = 0.30
    duplicate_line_characters: Share | None = 0.20
    duplicate_paragraph_characters: Share | None = 0.20
    top_2gram: Share | None = 0.20
    top_3gram: Share | None = 0.18
    top_4gram: Share | None = 0.16
    duplicate_5grams: Share | None = 0.15
    duplicate_6grams: Share | None = 0.14
    duplicate_7grams: Share | None = 0.13
    duplicate_8grams: Share | None = 0.12
    duplicate_9grams: Share | None = 0.11
    duplicate_10grams: Share | None = 0.10


class BoilerplateSettings(Section):
    """Penedo et al. 2023 (RefinedWeb), appendix G.2: lines that are no prose are removed."""

    enabled: bool = True
    max_uppercase: Share | None = 0.5  # of a line's letters; more is a headline or a button
    numbers: bool = True  # lines of digits and punctuation alone
    counters: bool = True  # "3 likes"
    single_words: bool = True
    max_phrase_words: Count = 10  # phrases are looked for in lines of at most that many words
    starts: tuple[Word, ...] = (
        "sign in",
        "sign up",
        "log in",
        "skip to",
        "share on",
        "follow us",
        "subscribe",
    )
    ends: tuple[Word, ...] = ("read more...", "read more…", "read more", "all rights reserved", "learn more")
    anywhere: tuple[Word, ...] = ("items in cart", "add to cart", "click here", "copyright ©", "back to top")
    max_removed_words: Share | None = 0.05  # of the text's words; where more would go, the document goes


class C4Settings(Section):
    """Raffel et al. 2020, section 2.2, with the constants of the published code."""

    enabled: bool = True
    citations: bool = True  # "[1]", "[edit]" and "[citation needed]" are removed
    terminal_punctuation: bool = True  # lines end in . ! ? or a closing quotation mark, and not in "..."
    min_line_words: Count | None = 5
    max_word_length: Count | None = 1000  # lines with a longer word go
    javascript_lines: bool = True
    policy_lines: bool = True  # "privacy policy", "use cookies" and the like
    lorem_ipsum: bool = True  # the document goes
    curly_bracket: bool = True  # the document goes
    min_sentences: Count | None = 3


class BadWordsSettings(Section):
    """C4's rule with a list of one's own: documents that hold an entry go."""

    enabled: bool = False
    files: tuple[Word, ...] = ()  # one word or phrase a line
    whole_words: bool = True  # false for languages written without spaces


class PersonalDataSettings(Section):
    """What stands in the place of personal data; null leaves a kind alone."""

    enabled: bool = True
    email: str | None = "<EMAIL>"
    ip_address: str | None = "<IP_ADDRESS>"  # public ones alone
    phone: str | None = "<PHONE>"
    credit_card: str | None = "<CREDIT_CARD>"
    iban: str | None = "<IBAN>"


class LowercaseSettings(Section):
    enabled: bool = False


class LengthSettings(Section):
    """What is left at the end; an empty text always goes."""

    enabled: bool = True
    min_characters: Annotated[int, Field(ge=1)] = 1
    max_characters: Annotated[int, Field(ge=1)] | None = None


class CleaningSettings(Section):
    """Every rule, in the order in which they are applied."""

    unicode: UnicodeSettings = UnicodeSettings()
    control_characters: ControlCharactersSettings = ControlCharactersSettings()
    whitespace: WhitespaceSettings = WhitespaceSettings()
    language: LanguageSettings = LanguageSettings()
    gopher_quality: GopherQualitySettings = GopherQualitySettings()
    gopher_repetition: GopherRepetitionSettings = GopherRepetitionSettings()
    boilerplate: BoilerplateSettings = BoilerplateSettings()
    c4: C4Settings = C4Settings()
    bad_words: BadWordsSettings = BadWordsSettings()
    personal_data: PersonalDataSettings = PersonalDataSettings()
    lowercase: LowercaseSettings = LowercaseSettings()
    length: LengthSettings = LengthSettings()


def load_settings(path: str | Path) -> CleaningSettings:
    """The settings in a JSON file; what it leaves out has its default.

    Raises ConfigError (a ValueError) with every unknown key and wrong value, one line each.
    """
    tree = read_json(path)
    try:
        # Through JSON, because there pydantic's strict mode takes an array for a tuple.
        return CleaningSettings.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise_problems(str(path), (_describe(details, tree) for details in error.errors()))
        raise


def _describe(details: ErrorDetails, tree: Tree) -> Problem:
    """One of pydantic's errors in our words."""
    names = [str(part) for part in details["loc"]]
    path = ".".join(names)
    if details["type"] == "extra_forbidden":
        section = CleaningSettings if len(names) == 1 else CleaningSettings.model_fields[names[0]].annotation
        return unknown_key(path, section.model_fields)  # type: ignore[union-attr]
    shown = json.dumps(details["input"], default=str)
    return Problem(path, f"{details['msg'].removeprefix('Input ')}, not {shown}")
