"""Unicode, control characters, white space, case, length, languages."""

import sys

import pytest

from megatron_lite.corpus import CorpusError, clean_text
from megatron_lite.corpus.cleaning import CleaningSettings, build_rules, clean_document
from megatron_lite.corpus.cleaning.language import _load_identifier
from tests.corpus.cleaning.case import clean, dropped


@pytest.mark.parametrize(
    ("switch", "text", "expected"),
    [
        (
            "repair_encoding",
            "caf\u00c3\u00a9 and\nd\u00e9j\u00e0 \u00e2\u20ac\u0153vu\u00e2\u20ac\u009d",
            "café and\ndéjà “vu”",
        ),
        ("repair_encoding", "dash \x96 here", "dash – here"),
        ("unescape_html", "P&EACUTE;REZ &lt; &amp;lt;", "PÉREZ < &lt;"),
        ("ligatures", "ﬁne ﬂow", "fine flow"),
        ("character_width", "ＬＯＵＤ，", "LOUD,"),
        ("straight_quotes", "“it’s”", '"it\'s"'),
    ],
)
def test_unicode_repairs(switch: str, text: str, expected: str) -> None:
    outcome = clean(text, "unicode", **{switch: True})
    assert outcome.text == expected
    (change,) = outcome.changes
    assert (change.check, change.amount) == ("unicode", len(text) - len(expected))
    assert clean(text, "unicode").text == text, "a switch that is off does nothing"


def test_what_is_right_stays() -> None:
    for text in (
        "plain & simple",
        "naïve café — 東京，Привет, Ωμέγα “quoted” 🙂",
        "<b>&lt;</b>",
        "1 & 2 &amp 3",
    ):
        outcome = clean_document(text, build_rules(CleaningSettings())[:1])
        assert (outcome.text, outcome.changes) == (text, [])


@pytest.mark.parametrize(
    ("form", "expected"), [("NFC", "é ²"), ("NFKC", "é 2"), ("NFD", "e\u0301 ²"), (None, "e\u0301 ²")]
)
def test_normalisation(form: str | None, expected: str) -> None:
    assert clean("e\u0301 ²", "unicode", normalization=form).text == expected


def test_control_characters() -> None:
    text = "a\x00b\x1b[31mred\x1b[0m\u00adc\ufeff\ufffd\r\nd\te\x7f"
    assert clean(text, "control_characters").text == "abredc\nd\te"
    assert clean("a\tb\nc é", "control_characters").changes == []


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"inner_runs": True}, "\n\n    a b \n\n\n\nc\n"),
        ({"line_ends": True}, "\n\n    a   b\n\n\n\nc\n"),
        ({"blank_lines": True}, "    a   b \n\nc"),
    ],
)
def test_whitespace(switches: dict[str, bool], expected: str) -> None:
    assert clean("\n\n    a   b \n\n\n\nc\n", "whitespace", **switches).text == expected


def test_the_whole_repair_is_that_of_clean_text() -> None:
    text = "  e\u0301  x \r\n\r\n\r\n\r\n\x07y\u00a0\u00a0z\t\n"
    assert clean_document(text, build_rules(CleaningSettings())[:3]).text == clean_text(text)


def test_lowercase_and_length() -> None:
    assert clean("ÀB ẞ", "lowercase").text == "àb ß"
    assert dropped("abc", "length", min_characters=3, max_characters=3) is None
    assert dropped("ab", "length", min_characters=3) == "min_characters"
    assert dropped("abcd", "length", min_characters=1, max_characters=3) == "max_characters"
    assert clean("", "lowercase").dropped == ("empty", "no text left")


ENGLISH = (
    "The weather was fine that morning, and they walked along the river until the bridge came into sight. "
)
GERMAN = "Am Morgen war das Wetter schön, und sie gingen am Fluss entlang, bis die Brücke in Sicht kam. "


def test_languages() -> None:
    pytest.importorskip("py3langid")
    assert dropped(ENGLISH, "language", allowed=["en", "fr"], min_probability=0.65) is None
    outcome = clean(GERMAN, "language", allowed=["en"], min_probability=0.65)
    assert outcome.dropped is not None and outcome.dropped.check == "language.allowed"
    assert outcome.dropped.reason.startswith("de (") and outcome.dropped.reason.endswith("not en")
    assert dropped(GERMAN, "language", allowed=[]) is None, "none named, all allowed"


def test_the_probability_is_a_threshold_and_can_be_stored() -> None:
    pytest.importorskip("py3langid")
    text = "hotel radio"
    fields = clean(text, "language", allowed=[], min_probability=0.0, store="lang").fields
    assert set(fields) == {"lang", "lang_probability"}
    probability = fields["lang_probability"]
    assert 0 < probability < 0.99 and probability == round(probability, 4)
    assert dropped(text, "language", allowed=[], min_probability=probability) is None
    assert dropped(text, "language", allowed=[], min_probability=probability + 1e-4) == "min_probability"


def test_languages_are_judged_by_the_middle() -> None:
    pytest.importorskip("py3langid")
    text = GERMAN * 5 + ENGLISH * 5 + GERMAN * 5
    assert dropped(text, "language", allowed=["en"], characters=400) is None
    assert dropped(text, "language", allowed=["en"], characters=10_000) == "allowed"


def test_an_unknown_language_is_refused() -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(CorpusError, match=r"allowed: english is not known; take .*en, "):
        clean("x", "language", allowed=["english"])


@pytest.mark.parametrize(("rule", "package"), [("unicode", "ftfy"), ("language", "py3langid.langid")])
def test_a_missing_package_is_named(rule: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _load_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CorpusError, match=r"needs the package \w+: pip install 'megatron_lite\[data\]'"):
        clean("x", rule)
