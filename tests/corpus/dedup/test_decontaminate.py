import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.corpus import CorpusError, _text
from megatron_lite.corpus.dedup import Decontaminate
from megatron_lite.corpus.dedup.decontaminate import cut_out, spans
from megatron_lite.corpus.dedup.words import table
from tests.corpus.dedup.case import run

QUESTION = "What is the airspeed velocity of an unladen swallow, if it is African, not European?"
SHOUTED = "-- what IS the\n\nair-speed velocity of an UNLADEN swallow if it is african"
FILLER = [f"word{number}" for number in range(600)]


def evaluations(folder: Path, *texts: str, key: str = "text") -> str:
    path = folder / "evaluations.jsonl"
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = _text.words(text, table()).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


WORDS = st.lists(st.sampled_from(["a", "B", "c.", "東", "-"]), max_size=9).map(" ".join)


@given(texts=st.lists(WORDS, max_size=9), wanted=st.lists(WORDS, min_size=1, max_size=4), n=st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_documents_with_an_ngram_in_common_go(
    tmp_path: Path, texts: list[str], wanted: list[str], n: int
) -> None:
    rule = Decontaminate([evaluations(tmp_path, *wanted)], words=n, minimum=n)
    _, ids, report = run(tmp_path, texts, rule)
    searched = set().union(*(ngrams(text, n) for text in wanted))
    assert ids == [number for number, text in enumerate(texts) if not ngrams(text, n) & searched]
    found = report["rules"][0]
    assert found["evaluations"] == len(wanted)
    assert found["evaluations_too_short"] == sum(not ngrams(text, n) for text in wanted)


def test_the_report_says_what_matched_where(tmp_path: Path) -> None:
    path = evaluations(tmp_path, "Too short.", QUESTION)
    texts = ["harmless", f"Quiz: {SHOUTED}! {QUESTION}", "airspeed velocity of an unladen swallow"]
    _, ids, report = run(tmp_path, texts, Decontaminate([path]))
    found = report["rules"][0]
    assert ids == [0, 2]
    assert (found["evaluations"], found["evaluations_too_short"], found["evaluations_found"]) == (2, 1, 1)
    assert found["matches"] == [
        {
            "document": f"{tmp_path}/in.jsonl:2",
            "evaluation": f"{path}:2",
            "text": "what is the airspeed velocity of an unladen swallow if it is african",
        }
    ]


def test_a_short_evaluation_is_looked_for_as_a_whole(tmp_path: Path) -> None:
    short = "one two three four five six seven eight"
    texts = [f"zero {short.upper()} nine", "one two three four five six seven"]
    assert run(tmp_path, texts, Decontaminate([evaluations(tmp_path, short)]))[1] == [1]
    report = run(tmp_path, texts, Decontaminate([evaluations(tmp_path, short)], minimum=9))[2]["rules"][0]
    assert (report["documents"], report["evaluations_too_short"]) == (0, 1)


def test_spans_are_cut_with_their_surroundings(tmp_path: Path) -> None:
    before, after = " ".join(FILLER[:300]), " ".join(FILLER[300:])
    texts = [f"{before} {SHOUTED} {after}", before, SHOUTED, f"{SHOUTED} {after[:300]}"]
    rule = Decontaminate([evaluations(tmp_path, QUESTION)], cut="span")
    kept, ids, report = run(tmp_path, texts, rule)
    matched = SHOUTED[3:]  # the words alone, without the dashes before them
    left, right = texts[0].split(matched)
    assert kept == [f"{left[:-200]}\n{right[200:]}", before]
    assert ids == [0, 1] and report["rules"][0]["documents_matched"] == 3
    assert report["rules"][0]["examples"][0] == {"removed": left[-200:] + "…"}


def test_spans_are_widened_to_whole_characters_and_joined() -> None:
    text = "ääää|ääää|ääää".encode()
    assert spans([(8, 9)], 1, text) == [(6, 11)]
    assert spans([(17, 18), (8, 9)], 2, text) == [(6, 11), (15, 20)]
    assert spans([(17, 18), (8, 9)], 3, text) == [(4, 22)]
    assert spans([(0, 8), (2, 4), (6, 9)], 0, text) == [(0, 9)]
    assert spans([(0, 8), (2, 4)], 0, text) == [(0, 8)]
    assert spans([(1, 2)], 100, text) == [(0, len(text))]


def test_short_pieces_go_and_too_many_take_the_document() -> None:
    text = b"0123456789"
    assert cut_out(text, [(2, 4), (6, 7)], 0, 10) == b"01\n45\n789"
    assert cut_out(text, [(2, 4), (6, 7)], 3, 10) == b"789"
    assert cut_out(text, [(2, 4), (6, 7)], 0, 3) == b"01\n45\n789"
    assert cut_out(text, [(2, 4), (6, 7)], 0, 2) == b""
    assert cut_out(text, [(0, 10)], 0, 2) == b""


@pytest.mark.parametrize("workers", [1, 2])
def test_any_field_of_the_evaluations(tmp_path: Path, workers: int) -> None:
    path = evaluations(tmp_path, QUESTION, key="question")
    texts = ["x", SHOUTED] * 9
    rule = Decontaminate([path], text_key="question")
    assert run(tmp_path, texts, rule, workers=workers)[0] == ["x"] * 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minimum": 0}, "minimum is from 1"),
        ({"minimum": 14}, "minimum is from 1"),
        ({"text_key": "q"}, "no key"),
    ],
)
def test_bad_settings_and_evaluations_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        run(tmp_path, ["x"], Decontaminate([evaluations(tmp_path, QUESTION)], **settings))
    assert not (tmp_path / "out.jsonl").exists()


def test_without_a_single_evaluation_nothing_goes(tmp_path: Path) -> None:
    assert run(tmp_path, ["x", "y"], Decontaminate([evaluations(tmp_path)], cut="span"))[1] == [0, 1]
