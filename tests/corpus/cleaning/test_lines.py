"""C4's and RefinedWeb's line rules, bad words."""

from pathlib import Path

import pytest

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.cleaning import CleaningSettings
from megatron_lite.corpus.cleaning.c4 import count_sentences
from tests.corpus.cleaning.case import clean, dropped


def lines_left(text: str, rule: str, **values: object) -> list[str]:
    outcome = clean(text, rule, **values)
    assert outcome.text is not None, outcome.dropped
    return outcome.text.split("\n")


def test_c4_defaults_are_the_papers() -> None:
    settings = CleaningSettings().c4
    assert (settings.min_line_words, settings.min_sentences, settings.max_word_length) == (5, 3, 1000)


@pytest.mark.parametrize(
    ("switch", "kept", "gone"),
    [
        ({"terminal_punctuation": True}, "One.", "One"),
        ({"terminal_punctuation": True}, "“One.”", "One,"),
        ({"terminal_punctuation": True}, "One?", "One..."),
        ({"min_line_words": 5}, "one two three four five", "one two three four"),
        ({"max_word_length": 1000}, "x" * 1000, "x" * 1001),
        ({"javascript_lines": True}, "java script", "Enable JavaScript."),
        ({"policy_lines": True}, "terms of service", "Read our Privacy Policy."),
    ],
)
def test_c4_lines(switch: dict[str, object], kept: str, gone: str) -> None:
    (name,) = switch
    text = f"{kept}\n\n  {kept}  \n{gone}\n"
    outcome = clean(text, "c4", **switch)
    assert outcome.text == f"{kept}\n\n  {kept}  "
    assert [tuple(change) for change in outcome.changes] == [(f"c4.{name}", 1, "lines removed")]
    assert clean(text, "c4").text == text, "a switch that is off does nothing"


@pytest.mark.parametrize(
    ("switch", "text"), [("lorem_ipsum", "See: Lorem Ipsum dolor."), ("curly_bracket", "if (x) {")]
)
def test_c4_pages(switch: str, text: str) -> None:
    assert dropped(text, "c4", **{switch: True}) == switch
    assert dropped(text, "c4") is None


def test_c4_sentences_are_counted_after_lines_are_removed() -> None:
    text = "One is. Two is!\nThree is?\nno end"
    assert dropped(text, "c4", min_sentences=3, terminal_punctuation=True) is None
    outcome = clean("One. Two is!\nthree\nfour", "c4", min_sentences=3, terminal_punctuation=True)
    assert outcome.dropped == ("c4.min_sentences", "2 sentences after removing 2 lines, under 3")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two.", 2),
        ('He said "no." She left.', 2),
        ("Version 1.2 of it.", 1),
        ("Oh!? Ah…", 1),
    ],
)
def test_sentences(line: str, count: int) -> None:
    assert count_sentences(line) == count


def test_c4_citations() -> None:
    text = "Fact[1][23] and[citation needed] more[edit], a[i] stays[x1]."
    assert clean(text, "c4", citations=True).text == "Fact and more, a[i] stays[x1]."


@pytest.mark.parametrize(
    ("switch", "kept", "gone"),
    [
        ({"single_words": True}, "two words", "Home"),
        ({"numbers": True}, "- -", "12.05.2020 | 13:00"),
        ({"counters": True}, "three likes", "3 likes"),
        ({"counters": True}, "3 more likes", "1.2k Views"),
        ({"max_uppercase": 0.5}, "ABcd 1", "ABCd 1"),
        ({"max_uppercase": 0.5}, "ÄÖüß", "ÄÖÜß"),
        ({"starts": ["sign in"]}, "sign inside the box", "Sign in to see this"),
        ({"ends": ["read more..."]}, "read more of it", "And then, read more..."),
        ({"anywhere": ["items in cart"]}, "items in carton", "You have 3 items in cart now"),
        ({"starts": ["a"], "max_phrase_words": 3}, "a b c d", "a b c"),
    ],
)
def test_boilerplate_lines(switch: dict[str, object], kept: str, gone: str) -> None:
    off: dict[str, object] = {"starts": [], "ends": [], "anywhere": []}
    text = f"plain text here\n{gone}\n{kept}"
    assert lines_left(text, "boilerplate", **off | switch) == ["plain text here", kept]
    assert clean(text, "boilerplate", **off).text == text


def test_too_much_boilerplate_drops_the_document() -> None:
    text = "word " * 19 + "\nHome"
    assert dropped(text, "boilerplate", single_words=True, max_removed_words=0.05) is None
    text = "word " * 18 + "\nHome"
    outcome = clean(text, "boilerplate", single_words=True, max_removed_words=0.05)
    assert outcome.dropped is not None
    assert outcome.dropped.reason == "0.0526 of the words in boilerplate lines, over 0.05"


def test_bad_words(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("Plum\n\npear tree\n#x!\nañil\n", encoding="utf-8")
    for bad in ("a PLUM.", "Pear Tree", "so #x! it", "AÑIL"):
        assert dropped(bad, "bad_words", files=[str(path)], whole_words=True) == "files", bad
    for good in ("plums plumber", "a pear, a tree", "pear trees", "xpear tree pear", "#x", "anil"):
        assert dropped(good, "bad_words", files=[str(path)], whole_words=True) is None, good
    assert dropped("plumber", "bad_words", files=[str(path)]) == "files"
    reason = clean("plum", "bad_words", files=[str(path)]).dropped
    assert reason is not None and "plum" not in reason.reason


def test_a_bad_word_list_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for files, message in (
        ([], "without a list"),
        ([str(tmp_path / "empty")], "no bad words"),
        (["absent"], "absent"),
    ):
        with pytest.raises(CorpusError, match=message):
            clean("x", "bad_words", files=files)
