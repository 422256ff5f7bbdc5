"""The least cleaning that text should have before training."""

from __future__ import annotations

import re
import unicodedata

# Cc and Cf that carry no text: controls but tab and line feed, byte order mark, soft hyphen, replacement
# character.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\ufeff\ufffd]")
_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\x85")
_INNER_SPACE = re.compile(r"(?<=\S)[^\S\n]{2,}(?=\S)")
_TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str, min_characters: int = 1) -> str | None:
    """`text` in Unicode NFC, without control characters, spaces at line ends and runs of spaces or blank
    lines.

    Indentation stays, so that code and lists keep their shape. None where fewer than `min_characters` are
    left.
    """
    text = unicodedata.normalize("NFC", text)
    text = _CONTROL.sub("", _LINE_ENDS.sub("\n", text))
    text = _INNER_SPACE.sub(" ", _TRAILING_SPACE.sub("", text))
    text = _BLANK_LINES.sub("\n\n", text).strip("\n")
    return text if len(text.strip()) >= max(min_characters, 1) else None
