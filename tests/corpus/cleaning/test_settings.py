import json
from pathlib import Path

import pytest

from megatron_lite.corpus.cleaning import CleaningSettings, build_rules, load_settings
from megatron_lite.corpus.cleaning.rules import _RULES

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "cleaning"


def write(path: Path, tree: object) -> Path:
    path.write_text(json.dumps(tree))
    return path


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    settings = load_settings(
        write(tmp_path / "s.json", {"c4": {"min_sentences": None}, "language": {"allowed": ["de"]}})
    )
    assert settings.c4.min_sentences is None and settings.c4.min_line_words == 5
    assert settings.language.allowed == ("de",)
    assert settings.gopher_quality == CleaningSettings().gopher_quality


def test_every_section_is_a_rule_in_the_same_order() -> None:
    assert list(_RULES) == list(CleaningSettings.model_fields)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"gopher_quallity": {}}, "gopher_quallity: unknown key; did you mean gopher_quality?"),
        ({"c4": {"min_sentence": 3}}, "c4.min_sentence: unknown key; did you mean c4.min_sentences?"),
        ({"c4": {"zzz": 3}}, "c4.zzz: unknown key; c4 takes citations, curly_bracket"),
        ({"c4": 3}, "c4: "),
        ({"c4": {"citations": "yes"}}, 'c4.citations: should be a valid boolean, not "yes"'),
        (
            {"language": {"min_probability": 1.5}},
            "language.min_probability: should be less than or equal to 1, not 1.5",
        ),
        ({"language": {"allowed": "en"}}, "language.allowed: "),
        ({"language": {"allowed": ["en", 3]}}, "language.allowed.1: "),
        ({"unicode": {"normalization": "nfc"}}, "unicode.normalization: "),
        ({"length": {"min_characters": 0}}, "length.min_characters: should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, tree: dict[str, object], message: str) -> None:
    path = write(tmp_path / "s.json", tree)
    with pytest.raises(ValueError) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"{path}: 1 problem\n  {message}")


def test_every_problem_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_settings(write(tmp_path / "s.json", {"a": 1, "c4": {"b": 2, "citations": 3}}))
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("text", ["", "[]", "{", '{"c4": {}, "c4": {}}'])
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json"):
        load_settings(tmp_path / "s.json")


def test_the_examples() -> None:
    """One is the defaults, written out."""
    assert load_settings(EXAMPLES / "english_web.json") == CleaningSettings()
    assert json.loads((EXAMPLES / "english_web.json").read_text()) == CleaningSettings().model_dump(
        mode="json"
    )
    rules = [name for name, _ in build_rules(load_settings(EXAMPLES / "any_text.json"))]
    assert rules == ["unicode", "control_characters", "whitespace", "language", "personal_data", "length"]
