from pathlib import Path

import pytest

from megatron_lite.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from megatron_lite.tokenizers.measure import Measure, Sample, first_difference, measure, table

SAMPLES = [Sample("x:1", "né ne"), Sample("x:2", "ne!"), Sample("x:7", "?")]


def test_measures() -> None:
    result = measure(CharTokenizer.train(["né ne"]), SAMPLES)
    assert result[:9] == ("char", 6, 3, 10, 9, 4, 9, 2, 1)
    assert result.failure == "x:2: character 3: 'ne!' came back as 'ne\ufffd'"
    result = measure(ByteTokenizer(), SAMPLES)
    assert (result.tokens, result.unknown, result.exact, result.failure) == (10, None, 3, None)


def test_the_table() -> None:
    lines = table(
        [
            Measure("byte", 257, 4, 1000, 900, 200, 500, None, 4, None, 0.001),
            Measure("char:t.json", 10_000, 4, 1000, 900, 200, 800, 8, 1, "x", 1.0),
        ]
    ).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["byte", "257", "2.000", "1.800", "2.500", "100.00%", "-", "1.0"],
        ["char:t.json", "10,000", "1.250", "1.125", "4.000", "25.00%", "1.000%", "0.0"],
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "back", "expected"),
    [
        ("abc", "abd", "character 3: 'abc' came back as 'abd'"),
        ("abc", "ab", "character 3: 'abc' came back as 'ab'"),
        (
            "x" * 1000 + "y" * 50,
            "x" * 1000,
            f"character 1,001: {'x' * 20 + 'y' * 20!r} came back as {'x' * 20!r}",
        ),
    ],
)
def test_first_difference(text: str, back: str, expected: str) -> None:
    assert first_difference(text, back) == expected


def test_unknown_tokens_of_libraries_are_counted(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"ne": 0, "[?]": 1}, unk_token="[?]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "t.json"))
    result = measure(load_tokenizer(f"hf:{tmp_path}/t.json"), SAMPLES)
    assert (result.tokens, result.unknown) == (5, 3)
