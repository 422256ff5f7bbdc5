import gzip
import json
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.reader import (
    Chunk,
    Problem,
    Record,
    RecordWriter,
    parse_chunk,
    parse_records,
    read_chunks,
    read_records,
)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 20, 10_000])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_keep_their_numbers_in_chunks_of_any_size(
    tmp_path: Path, chunk_bytes: int, ending: str
) -> None:
    content = b"first\n\nthird \xe2\x80\xa8 still third\x0b\x85\n" + b"x" * 50 + b"\nno newline at the end"
    path = tmp_path / f"x.jsonl{ending}"
    if ending == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(content))
    else:
        path.write_bytes(gzip.compress(content) if ending else content)
    chunks = list(read_chunks([path], chunk_bytes))
    assert b"".join(chunk.data for chunk in chunks) == content
    assert sum(chunk.size for chunk in chunks) == len(content)
    for chunk in chunks:
        assert pickle.loads(pickle.dumps(chunk)) == chunk
    lines = [problem.line for chunk in chunks for problem in parse_chunk(chunk, ["text"])[1]]
    assert lines == [1, 3, 4, 5]


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n{two}\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei ß".encode()))
    (tmp_path / "c.txt").write_bytes(b"")
    texts = [parse_chunk(chunk, ["body"])[0] for chunk in read_chunks([tmp_path])]
    assert texts == [[["one\n{two}\r\n"]], [["drei ß"]], [[""]]]
    assert [record.content for record in read_records([tmp_path / "c.txt"], "body")] == [{"body": ""}]


@pytest.mark.parametrize(
    ("data", "reason"), [("hi".encode("utf-16-le"), "NUL at byte 2"), (b"a\xff", "UTF-8 at byte 2")]
)
def test_what_is_no_plain_text_is_a_problem(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    [chunk] = read_chunks([tmp_path])
    documents, [problem] = parse_chunk(chunk, ["text"])
    assert not documents and reason in problem.reason


@pytest.mark.parametrize("name", ["absent.jsonl", "cut.jsonl.gz", "not.gz"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:-12])
    (tmp_path / "not.gz").write_bytes(b"plain")
    with pytest.raises(CorpusError, match=f"{name}: cannot be read"):
        list(read_chunks([tmp_path / name]))


def test_a_missing_file_is_an_error_before_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(CorpusError, match="absent"):
        next(read_chunks([tmp_path / "a.jsonl", tmp_path / "absent"]))


@pytest.mark.parametrize(
    ("name", "package"),
    [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow"), ("x.warc", "resiliparse"), ("x.wet", "warcio")],
)
def test_a_missing_library_is_an_error_before_the_first_line(
    tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CorpusError, match=rf"{name}: a .* file needs the package {package}: pip install"):
        next(read_chunks([tmp_path]))


def test_bad_lines_are_numbered_and_blank_lines_are_nothing() -> None:
    data = b'{"text": "a"}\r\n \n{\n\xef\xbb\xbf{"text": ""}\n\xef\xbb\xbf \n\n}\n\xef\xbb\xbf\n{"text": "cut'
    chunk = Chunk("f", 10, data, "jsonl")
    documents, problems = parse_chunk(chunk, ["text"])
    assert documents == [["a"], [""]]
    assert [str(problem).split(": ")[0] for problem in problems] == ["f:12", "f:16", "f:18"]
    assert ["cut short" in problem.reason for problem in problems] == [False, False, True]
    assert [entry.line for entry in parse_records(chunk)] == [10, 12, 13, 16, 18]


def test_several_keys_are_several_texts() -> None:
    chunk = Chunk("f", 1, b'{"b": "2", "a": "1", "c": null}\n{"a": "3"}\n', "jsonl")
    assert parse_chunk(chunk, ["a", "b"]) == ([["1", "2"]], [Problem("f", 2, 'no key "b"; there is "a"')])


def test_what_is_whole_but_no_object_is_not_called_cut_short() -> None:
    [problem] = parse_chunk(Chunk("f", 1, b"[1]", "jsonl"), ["text"])[1]
    assert problem.reason == "a JSON list, not an object"


@given(st.lists(st.binary(max_size=12) | st.sampled_from([b'{"text": "a"}', b'{"text": ""}', b"{}", b" "])))
def test_no_line_is_lost(lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    expected = [line for line in data.split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip()]
    chunk = Chunk("f", 1, data, "jsonl")
    documents, problems = parse_chunk(chunk, ["text"])
    assert len(documents) + len(problems) == len(expected)
    entries = list(parse_records(chunk))
    assert len(entries) == len(expected)
    assert [entry for entry in entries if isinstance(entry, Problem)] == problems
    assert [[entry.content["text"]] for entry in entries if isinstance(entry, Record)] == documents


CONTENTS = [
    {"text": "ünï 🙂\n", "n": [1, 2.5, None, True], "big": 2**80, "nested": {"a": float("inf")}},
    {"text": "", "half": "\ud800"},
    {"text": "a\0\u2028", "float": 1e16},
]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("orjson", [True, False])
def test_records_come_back_as_they_were_written(
    tmp_path: Path, ending: str, orjson: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ending.endswith("zst"):
        pytest.importorskip("zstandard")
    if not orjson:
        monkeypatch.setitem(sys.modules, "orjson", None)
    path = tmp_path / f"x{ending}"
    with RecordWriter(path) as writer:
        for content in CONTENTS:
            writer.write(content)
    assert list(read_records([path])) == [
        Record(str(path), n, content) for n, content in enumerate(CONTENTS, 1)
    ]


def test_a_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="a bytes cannot"), RecordWriter(tmp_path / "x.jsonl") as writer:
        writer.write({"text": "a"})
        writer.write({"text": b"a"})
    assert not list(tmp_path.iterdir())


def test_a_long_line_is_read_whole(tmp_path: Path) -> None:
    text = "long " * 10_000
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "b"}\n')
    chunks = list(read_chunks([tmp_path], 100))
    assert [parse_chunk(chunk, ["text"])[0] for chunk in chunks] == [[[text], ["b"]]]
