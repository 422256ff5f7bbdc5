"""What a word is: the table of characters that csrc/text.cpp reads."""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

LEFT_OUT, SPACE, ALONE = 0, 1, 1 << 31
_SIZE = 0x20000  # what lies beyond are ideographs, which stand alone

# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han (with its compatibility forms).
_ALONE = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)


@cache
def table() -> NDArray[np.uint32]:
    """[code points] uint32: LEFT_OUT (punctuation, symbols, controls), SPACE, or the lower case, | ALONE where the
    character is a word of its own. Letters, digits and the marks upon letters count."""
    entries = np.array([_entry(chr(code)) for code in range(_SIZE)], np.uint32)
    for first, last in _ALONE:
        part = entries[first : last + 1]
        part[part > SPACE] |= ALONE
    return entries


def _entry(character: str) -> int:
    if character.isspace():
        return SPACE
    if not character.isalnum() and not unicodedata.category(character).startswith("M"):
        return LEFT_OUT
    lower = character.lower()
    return ord(lower if len(lower) == 1 else character)
