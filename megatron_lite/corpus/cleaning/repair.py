"""Unicode repair and normalisation, control characters, white space, case."""

from __future__ import annotations

import re
import unicodedata

from megatron_lite.corpus.clean import remove_controls, tidy_whitespace
from megatron_lite.corpus.cleaning.page import Change, Edit, Page, Rule
from megatron_lite.corpus.cleaning.settings import (
    ControlCharactersSettings,
    LowercaseSettings,
    UnicodeSettings,
    WhitespaceSettings,
)
from megatron_lite.corpus.files import require

_TERMINAL_ESCAPES = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")


def unicode_rule(settings: UnicodeSettings) -> Rule:
    """ftfy's fixes, each over the whole text and only where something in it calls for one.

    ftfy's own fix_text goes line by line through all of them, at a tenth of the speed.
    """
    ftfy = require("ftfy", "the unicode rule")
    fixes, is_bad = ftfy.fixes, ftfy.is_bad

    def repair_lines(text: str) -> str:
        # By line, as ftfy does: one wrong line must not stop the repair of another.
        lines = text.split("\n")
        return "\n".join(
            line if line.isascii() or not is_bad(line) else ftfy.fix_encoding(line) for line in lines
        )

    def rule(page: Page) -> Edit | None:
        text = page.text
        if settings.unescape_html and "&" in text and "<" not in text:
            text = fixes.unescape_html(text)
        if not text.isascii():
            if settings.repair_encoding:
                text = repair_lines(text)
                text = fixes.fix_c1_controls(text)
            if settings.ligatures:
                text = fixes.fix_latin_ligatures(text)
            if settings.character_width:
                text = fixes.fix_character_width(text)
            if settings.straight_quotes:
                text = fixes.uncurl_quotes(text)
            if settings.normalization is not None:
                text = unicodedata.normalize(settings.normalization, text)
        return _edited(page, text)

    return rule


def control_characters_rule(settings: ControlCharactersSettings) -> Rule:
    def rule(page: Page) -> Edit | None:
        text = page.text
        # Most texts have nothing below a space but tabs and line feeds, and printable ASCII is seen at once.
        if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
            return None
        return _edited(page, remove_controls(_TERMINAL_ESCAPES.sub("", text)))

    return rule


def whitespace_rule(settings: WhitespaceSettings) -> Rule:
    def rule(page: Page) -> Edit | None:
        return _edited(
            page,
            tidy_whitespace(
                page.text,
                line_ends=settings.line_ends,
                inner_runs=settings.inner_runs,
                blank_lines=settings.blank_lines,
            ),
        )

    return rule


def lowercase_rule(settings: LowercaseSettings) -> Rule:
    def rule(page: Page) -> Edit | None:
        return _edited(page, page.text.lower())

    return rule


def _edited(page: Page, text: str) -> Edit | None:
    if text == page.text:
        return None
    fewer = len(page.text) - len(text)
    return Edit(text, [Change("", fewer, "characters fewer")], {})
