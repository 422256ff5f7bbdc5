import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.cleaning import CleaningSettings, clean_corpus
from tests.corpus.cleaning.case import only

WORDS = CleaningSettings.model_validate(
    only("gopher_quality", min_words=3).model_dump()
    | {"personal_data": {"enabled": True}, "lowercase": {"enabled": True}}
)
RECORDS: list[dict[str, Any]] = [
    {"id": 1, "text": "One Two Three", "meta": {"ü": [1, None]}},
    {"id": 2, "text": "too short"},
    {"id": 3, "text": "write to A@B.org, or C@D.org", "text2": "A@B.org"},
    {"id": 4, "text": ""},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_kept_records_keep_their_fields_and_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", RECORDS)
    report = clean_corpus([path], tmp_path / "o.jsonl", WORDS, dropped_output=tmp_path / "dropped.jsonl")
    assert read(tmp_path / "o.jsonl") == [
        RECORDS[0] | {"text": "one two three"},
        RECORDS[2] | {"text": "write to <email>, or <email>"},
    ]
    assert read(tmp_path / "dropped.jsonl") == [
        RECORDS[1] | {"dropped_by": "gopher_quality.min_words", "dropped_because": "2 words, under 3"},
        RECORDS[3] | {"dropped_by": "gopher_quality.min_words", "dropped_because": "0 words, under 3"},
    ]
    assert (report.read, report.kept, report.dropped, report.rejected) == (4, 2, 2, 0)
    assert report.bytes_read == sum(len(record["text"]) for record in RECORDS)
    assert report.bytes_kept == len("one two three" + "write to <email>, or <email>")


def test_the_report(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", RECORDS)
    report = clean_corpus([path], tmp_path / "o.jsonl", WORDS)
    content = json.loads(report.to_json(WORDS.model_dump(mode="json")))
    assert content["documents"] == {"read": 4, "kept": 2, "dropped": 2, "rejected": 0}
    assert content["dropped"] == {
        "gopher_quality.min_words": {
            "documents": 2,
            "bytes": 9,
            "examples": [f"{path}:2: 2 words, under 3", f"{path}:4: 0 words, under 3"],
        }
    }
    email = content["changed"]["personal_data.email"]
    assert email == {"documents": 1, "count": 2, "unit": "masked", "examples": [f"{path}:3: 2 masked"]}
    assert content["changed"]["lowercase"]["documents"] == 2
    assert content["settings"]["gopher_quality"]["min_words"] == 3
    text = str(report)
    assert "documents read 4 = kept 2 + dropped 2 + rejected 0" in text
    assert f"    {path}:2: 2 words, under 3" in text and "MB/s" in text


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    records = [{"n": n, "text": f"Word number {n} a{n}@b.org " * (n % 7)} for n in range(300)]
    paths = [write(tmp_path / "a.jsonl", records[:200]), write(tmp_path / "b.jsonl", records[200:])]
    results = []
    for workers, chunk_bytes in ((1, 1 << 20), (2, 999)):
        out, dropped = tmp_path / f"{workers}.jsonl.gz", tmp_path / f"d{workers}.jsonl"
        report = clean_corpus(
            paths, out, WORDS, dropped_output=dropped, workers=workers, chunk_bytes=chunk_bytes
        )
        results.append((out.read_bytes(), dropped.read_bytes(), report.to_json({})))
        assert report.kept > 200 and report.dropped > 40
    assert results[0] == results[1]


def test_bad_lines_stop_or_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one two three"}\n{"text": null}\n\n{"text"\n{"text": "four five six"}\n')
    with pytest.raises(CorpusError, match=rf'{path}:2: "text" is null'):
        clean_corpus([path], tmp_path / "o.jsonl", WORDS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"], "nothing is left"
    report = clean_corpus([path], tmp_path / "o.jsonl", WORDS, on_error="skip")
    assert (report.read, report.kept, report.dropped, report.rejected) == (4, 2, 0, 2)
    assert (
        f"{path}:4: not JSON" in caplog.text
        and f"{path}:2: " in json.loads(report.to_json({}))["rejected"][0]
    )


def test_another_text_key_and_plain_text(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"body": "One two three", "text": 5}])
    (tmp_path / "y.txt").write_text("Four five six")
    clean_corpus([tmp_path / "x.jsonl", tmp_path / "y.txt"], tmp_path / "o.jsonl", WORDS, text_key="body")
    assert read(tmp_path / "o.jsonl") == [{"body": "one two three", "text": 5}, {"body": "four five six"}]


def test_a_stored_language_is_a_field(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    path = write(tmp_path / "x.jsonl", [{"text": "This is an English sentence, and so is that."}])
    clean_corpus([path], tmp_path / "o.jsonl", only("language", allowed=[], store="lang"))
    (record,) = read(tmp_path / "o.jsonl")
    assert list(record) == ["text", "lang", "lang_probability"] and record["lang"] == "en"


def test_one_file_for_both_outputs_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(CorpusError, match="take two files"):
        clean_corpus([path], tmp_path / "o", WORDS, dropped_output=tmp_path / "y" / ".." / "o")


def test_no_input_is_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", RECORDS)
    for output, dropped in ((path, None), (tmp_path / "o.jsonl", path)):
        with pytest.raises(CorpusError, match=rf"{path}: is among the inputs"):
            clean_corpus([tmp_path], output, WORDS, dropped_output=dropped)
    assert read(path) == RECORDS


@pytest.mark.parametrize("workers", [1, 2])
def test_where_all_lines_are_bad_the_first_are_listed(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": "x"}] * 1234)
    with pytest.raises(CorpusError) as caught:
        clean_corpus([path], tmp_path / "o.jsonl", WORDS, workers=workers)
    lines = str(caught.value).splitlines()
    assert lines[9] == f'{path}:10: no key "text"; there is "body"'
    assert lines[10:] == ["... and 1,224 more (--on-error skip leaves such records out)"]
