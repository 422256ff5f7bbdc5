import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.corpus.dedup import Exact, Lines
from tests.corpus.dedup.case import run

TEXTS = st.lists(
    st.sampled_from(["", " ", "a", "A", "a  b", " A b\n", "straße", "STRASSE", "long " * 30]), max_size=40
)
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


@given(texts=TEXTS, normalize=st.booleans())
@quick
def test_the_first_of_equal_documents_stays(tmp_path: Path, texts: list[str], normalize: bool) -> None:
    def key(text: str) -> str:
        return " ".join(text.split()).casefold() if normalize else text

    first = {key(text): number for number, text in reversed(list(enumerate(texts)))}
    _, ids, report = run(tmp_path, texts, Exact(normalize))
    assert ids == sorted(first.values())
    for example in report["rules"][0]["examples"]:
        dropped, kept = (int(example[name].rpartition(":")[2]) - 1 for name in ("dropped", "kept"))
        assert key(texts[dropped]) == key(texts[kept]) and kept == first[key(texts[kept])]


def lines_by_hand(texts: list[str], separator: str, minimum: int) -> list[str]:
    """As the docstring of Lines says it, one line after another."""
    seen: set[str] = set()
    results = []
    for text in texts:
        lines = text.split(separator)
        kept = [line for line in lines if line.strip() not in seen]
        seen |= {line.strip() for line in lines if len(line.strip().encode()) >= minimum}
        results.append(separator.join(kept))
    return results


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["", "ab", "abc", " abc ", "üü", "x" * 50]), max_size=6), max_size=12
    ),
    unit=st.sampled_from(["line", "paragraph"]),
    minimum=st.integers(1, 5),
)
@quick
def test_lines_of_earlier_documents_go(
    tmp_path: Path, texts: list[list[str]], unit: str, minimum: int
) -> None:
    separator = {"line": "\n", "paragraph": "\n\n"}[unit]
    documents = [separator.join(lines) for lines in texts]
    expected = lines_by_hand(documents, separator, minimum)
    kept, ids, report = run(tmp_path, documents, Lines(unit, minimum))
    stays = [n for n, text in enumerate(expected) if text.strip() or text == documents[n]]
    assert ids == stays and kept == [expected[number] for number in stays]
    assert report["rules"][0]["documents"] == len(texts) - len(kept)


@pytest.mark.parametrize("rule", [Exact(), Exact(True), Lines("line", 3)])
def test_pieces_workers_and_memory_change_nothing(tmp_path: Path, rule: Exact | Lines) -> None:
    texts = [f"text {number % 37}\nline {number % 11} ü\n{number}" for number in range(300)]
    texts += [text.upper() for text in texts[:50]]
    results = []
    for number, (workers, memory, size) in enumerate(
        [(1, 1 << 30, 1 << 20), (1, 5000, 300), (2, 9000, 3000)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        kept, ids, report = run(folder, texts, rule, workers=workers, memory=memory, piece_bytes=size)
        results.append((kept, ids, (folder / "out.jsonl").read_bytes(), report["rules"][0]["documents"]))
    assert all(before == after for before, after in itertools.pairwise(results))
