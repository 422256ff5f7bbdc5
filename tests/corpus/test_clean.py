import pytest

from megatron_lite.corpus import clean_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e\u0301", "é"),
        ("a\x00b\x1b[0m\u00adc\ufeff\ufffd", "ab[0mc"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("a   b \t c", "a b c"),
        ("    code\n\tdeeper", "    code\n\tdeeper"),
        ("trailing   \nspace\t", "trailing\nspace"),
        ("\n\n  a\n\n\n\n\nb\n\n", "  a\n\nb"),
        ("", None),
        (" \n\t ", None),
        ("\x00", None),
    ],
)
def test_text_is_cleaned(text: str, expected: str | None) -> None:
    assert clean_text(text) == expected
    if expected is not None:
        assert clean_text(expected) == expected, "what is clean stays as it is"


def test_short_texts_are_dropped() -> None:
    assert clean_text("  abc  ", 3) == "  abc"
    assert clean_text("  abc  ", 4) is None


def test_a_line_of_spaces_is_cleaned_in_one_pass() -> None:
    """Minutes, were every space of a run tried as its start."""
    spaces = " " * 500_000
    assert clean_text(f"a{spaces}b{spaces}\n{spaces}c") == f"a b\n{spaces}c"
