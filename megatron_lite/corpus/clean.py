"""The least cleaning that text should have before training."""

from __future__ import annotations

import re
import unicodedata

# Cc and Cf that carry no text: controls but tab and line feed, byte order mark, soft hyphen, replacement
# character.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\ufeff\ufffd]")
_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\x85")
_INNER_SPACE = re.compile(r"(?<=\S)[^\S\n]{2,}(?=\S)")
# From the start of a run alone, and without going back in it: a line may be a million spaces.
_TRAILING_SPACE = re.compile(r"(?<![^\S\n])[^\S\n]++$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str, min_characters: int = 1) -> str | None:
    """`text` in Unicode NFC, without control characters, spaces at line ends and runs of spaces or blank
    lines.

    Indentation stays, so that code and lists keep their shape. None where fewer than `min_characters` are
    left.
    """
    text = tidy_whitespace(remove_controls(unicodedata.normalize("NFC", text)))
    return text if len(text.strip()) >= max(min_characters, 1) else None


def remove_controls(text: str) -> str:
    """`text` with line feeds as its only line ends, and without characters that carry no text."""
    return _CONTROL.sub("", _LINE_ENDS.sub("\n", text))


def tidy_whitespace(
    text: str, *, line_ends: bool = True, inner_runs: bool = True, blank_lines: bool = True
) -> str:
    """`text` without spaces at line ends, runs of spaces inside lines, and more than one blank line in a row or
    any at its ends; indentation stays."""
    if line_ends:
        text = _TRAILING_SPACE.sub("", text)
    if inner_runs:
        text = _INNER_SPACE.sub(" ", text)
    if blank_lines:
        text = _BLANK_LINES.sub("\n\n", text).strip("\n")
    return text
