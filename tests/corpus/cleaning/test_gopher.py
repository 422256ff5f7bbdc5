"""Each threshold of Rae et al. 2021, with a text on each side of it."""

import itertools

import pytest

from megatron_lite.corpus.cleaning import CleaningSettings
from megatron_lite.corpus.cleaning.gopher_repetition import repetition
from megatron_lite.corpus.cleaning.page import Page
from tests.corpus.cleaning.case import clean, dropped

QUALITY, REPETITION = "gopher_quality", "gopher_repetition"


def distinct(count: int, length: int = 4) -> list[str]:
    """Different words of one length."""
    return [
        "".join(letters) for letters in itertools.islice(itertools.product("abcdefgh", repeat=length), count)
    ]


@pytest.mark.parametrize(
    ("threshold", "kept", "gone"),
    [
        ({"min_words": 50}, "a " * 50, "a " * 49),
        ({"max_words": 100}, "a " * 100, "a " * 101),
        ({"min_mean_word_length": 3}, "ab abcd", "ab abc"),
        ({"max_mean_word_length": 10}, "a" * 10, "a" * 11),
        ({"max_hashes_per_word": 0.1}, "# " + "a " * 9, "# # " + "a " * 17),
        ({"max_ellipses_per_word": 0.1}, "a... " + "a " * 9, "a… a... " + "a " * 17),
        ({"max_bullet_lines": 0.9}, "• a\n" * 9 + "a", "  • a\n\n" * 10 + "a"),
        ({"max_ellipsis_lines": 0.3}, "a...\n" * 3 + "a\n" * 7, "a…\n" * 3 + "a\n" * 6),
        ({"min_alphabetic_words": 0.8}, "a1 é 東 x, 1", "a b c 1 2"),
        ({"min_stop_words": 2}, "(The cat, that sat", "the the The cat"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_quality(threshold: dict[str, float], kept: str, gone: str) -> None:
    (name,) = threshold
    assert dropped(kept, QUALITY, **threshold) is None
    assert dropped(gone, QUALITY, **threshold) == name
    assert dropped(gone, QUALITY) is None, "a threshold that is null is off"


def test_quality_defaults_are_the_papers() -> None:
    settings = CleaningSettings().gopher_quality
    assert (settings.min_words, settings.max_words) == (50, 100_000)
    assert (settings.min_mean_word_length, settings.max_mean_word_length) == (3, 10)
    assert (settings.max_hashes_per_word, settings.max_ellipses_per_word) == (0.1, 0.1)
    assert (settings.max_bullet_lines, settings.max_ellipsis_lines) == (0.9, 0.3)
    assert (settings.min_alphabetic_words, settings.min_stop_words) == (0.8, 2)
    assert settings.stop_words == ("the", "be", "to", "of", "and", "that", "have", "with")


def test_the_reason_has_the_measured_figure() -> None:
    outcome = clean("word " * 12, QUALITY, min_words=50)
    assert outcome.dropped == (f"{QUALITY}.min_words", "12 words, under 50")


def test_repetition_defaults_are_the_papers() -> None:
    defaults = CleaningSettings().gopher_repetition.model_dump(exclude={"enabled"})
    assert list(defaults.values()) == [
        *(0.30, 0.30, 0.20, 0.20),
        *(0.20, 0.18, 0.16),
        *(0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
    ]


def test_duplicate_lines_and_paragraphs() -> None:
    """From the second occurrence on; blank lines and spaces around lines are nothing."""
    lines = ["same", "  same ", "same", *distinct(7)]
    assert dropped("\n\n".join(lines), REPETITION, duplicate_lines=0.20) is None
    assert dropped("\n\n".join(lines), REPETITION, duplicate_lines=0.19) == "duplicate_lines"
    assert dropped("\n \n\n".join(lines), REPETITION, duplicate_paragraphs=0.19) == "duplicate_paragraphs"
    assert dropped("\n".join(lines), REPETITION, duplicate_paragraphs=0.0) is None, "one paragraph"
    # 2 x 10 of 100 characters
    text = "\n".join(["x" * 10] * 3 + ["y" * 70])
    assert dropped(text, REPETITION, duplicate_line_characters=0.20) is None
    assert dropped(text, REPETITION, duplicate_line_characters=0.19) == "duplicate_line_characters"
    text = text.replace("\n", "\n\n")
    assert dropped(text, REPETITION, duplicate_paragraph_characters=0.20) is None
    assert dropped(text, REPETITION, duplicate_paragraph_characters=0.19) == "duplicate_paragraph_characters"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_top_ngrams(n: int) -> None:
    """The most frequent n-gram's occurrences: 3 n-grams of 4 letters a word in 40 words."""
    words, gram = distinct(40 - 3 * n), [f"rep{number}" for number in range(n)]
    text = " ".join([*gram, *words[:5], *gram, *words[5:9], *gram, *words[9:]])
    share = 3 * n / 40
    assert dropped(text, REPETITION, **{f"top_{n}gram": share}) is None
    assert dropped(text, REPETITION, **{f"top_{n}gram": share - 0.001}) == f"top_{n}gram"
    assert dropped(" ".join(gram), REPETITION, **{f"top_{n}gram": 0.0}) is None, "once is no repetition"


@pytest.mark.parametrize("n", range(5, 11))
def test_duplicate_ngrams(n: int) -> None:
    """Words of later occurrences: one phrase of n words twice in 50 words."""
    words, gram = distinct(50 - 2 * n), [f"re{number:02}" for number in range(n)]
    text = " ".join([*gram, *words[:5], *gram, *words[5:]])
    assert dropped(text, REPETITION, **{f"duplicate_{n}grams": n / 50}) is None
    assert dropped(text, REPETITION, **{f"duplicate_{n}grams": n / 50 - 0.001}) == f"duplicate_{n}grams"
    if n < 10:
        assert dropped(text, REPETITION, **{f"duplicate_{n + 1}grams": 0.0}) is None


def test_words_in_overlapping_duplicates_count_once() -> None:
    shares = dict(repetition(Page("a b c d e f g x a b c d e f g y")))
    assert shares["duplicate_5grams"] == shares["duplicate_7grams"] == 7 / 16
    shares = dict(repetition(Page("ha " * 20)))
    assert shares["top_2gram"] == 1.0 and shares["duplicate_10grams"] == 19 / 20


def slow_repetition(words: list[str]) -> dict[str, float]:
    """The same shares, word by word."""
    total, shares = sum(map(len, words)), {}
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n <= 4:
            most = max(map(grams.count, grams), default=0)
            top = max((len("".join(gram)) for gram in grams if grams.count(gram) == most), default=0)
            shares[f"top_{n}gram"] = min(most * top / total, 1) if most > 1 else 0
        else:
            covered = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
            shares[f"duplicate_{n}grams"] = sum(len(words[i]) for i in covered) / total
    return shares


@pytest.mark.parametrize("vocabulary", ["ab", "ab cde f gh i", "the of and to a in is word text line"])
def test_ngrams_against_counting_by_hand(vocabulary: str) -> None:
    import random

    for seed in range(12):
        words = random.Random(seed).choices(vocabulary.split(), k=1 + 7 * seed)
        shares = dict(repetition(Page(" ".join(words))))
        for name, share in slow_repetition(words).items():
            assert shares[name] == pytest.approx(share, abs=1e-12), (name, words)


def test_a_text_without_words() -> None:
    assert set(dict(repetition(Page(" \n "))).values()) == {0.0}
