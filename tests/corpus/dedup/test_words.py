import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.corpus import _text
from megatron_lite.corpus.dedup.words import table

TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\u3000.,'-aBÄßИ東ไé🙂")), max_size=40
)


def words_by_hand(text: str) -> list[str]:
    """As the head of csrc/text.cpp says it."""
    result = [""]
    for character in text:
        script = unicodedata.name(character, "").split(" ")[0]
        alone = script in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER")
        if character.isspace():
            result.append("")
        elif character.isalnum() or unicodedata.category(character).startswith("M"):
            lower = character.lower() if len(character.lower()) == 1 else character
            result += [lower, ""] if alone else []
            result[-1] += "" if alone else lower
    return [word for word in result if word]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop -- U.S.A.!", "dont stop usa"),
        ("\tÄRGER\u00a0ΣΟΦΙΑ\r\n", "ärger σοφια"),
        ("東京 is ไทย", "東 京 is ไ ท ย"),
        ("x東y 𠀀", "x 東 y 𠀀"),
        ("e\u0301t\u00ad\u200bx", "e\u0301tx"),
        ("... --", ""),
        ("İ", "İ"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert _text.words(text, table()) == expected == _text.words(text.encode(), table())


@given(st.text(st.characters(max_codepoint=0x2FFF, codec="utf-8"), max_size=60))
def test_words_by_hand(text: str) -> None:
    # Up to 0x2FFF, since what a script is called in the Unicode data is coarser beyond.
    assert _text.words(text, table()).split(" ") == (words_by_hand(text) or [""])


def ngrams_by_hand(text: str, n: int, shorter: bool) -> list[tuple[str, ...]]:
    words = _text.words(text, table()).split()
    if shorter and 0 < len(words) < n:
        return [tuple(words)]
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@given(TEXTS, st.integers(1, 5), st.booleans())
def test_equal_ngrams_have_equal_hashes_and_others_not(text: str, n: int, shorter: bool) -> None:
    ngrams = ngrams_by_hand(text, n, shorter)
    hashes = _text.ngram_hashes(text, n, table(), shorter).tolist()
    assert len(hashes) == len(ngrams)
    assert len(set(zip(hashes, ngrams, strict=True))) == len(set(hashes)) == len(set(ngrams))


def hashes_by_hand(words: list[str], n: int) -> list[int]:
    whole = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & whole
        return z ^ (z >> 31)

    def fnv(word: str) -> int:
        value = 0xCBF29CE484222325
        for character in word:
            value = (value ^ ord(character)) * 0x100000001B3 & whole
        return mix(value)

    found = []
    for start in range(len(words) - n + 1):
        total = 0
        for word in words[start : start + n]:
            total = (total * 0x9E3779B97F4A7C15 + fnv(word)) & whole
        found.append(mix(total))
    return found


def test_hashes_are_those_of_the_formula_for_ever() -> None:
    text = "The quick brown fox jumps over the lazy dog, süß 東京"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "süß", "東", "京"]
    for n in (1, 3, 12):
        assert _text.ngram_hashes(text, n, table()).tolist() == hashes_by_hand(words, n)


@given(TEXTS, st.lists(st.text(st.sampled_from("ab 東"), max_size=9), max_size=5), st.integers(1, 3))
def test_matches_are_the_ngrams_in_common(text: str, wanted: list[str], n: int) -> None:
    text += "ab a 東 b a"
    every = [_text.ngram_hashes(other, n, table()) for other in wanted] + [np.zeros(0, np.uint64)]
    bounds, hashes = _text.match_ngrams(text, n, table(), _text.hash_table(np.concatenate(every)))
    found = [_text.words(text.encode()[begin:end], table()) for begin, end in bounds.tolist()]
    searched = {ngram for other in wanted for ngram in ngrams_by_hand(other, n, False)}
    assert found == [" ".join(ngram) for ngram in ngrams_by_hand(text, n, False) if ngram in searched]
    assert len(hashes) == len(found)
