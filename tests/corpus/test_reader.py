import gzip
from pathlib import Path

import pytest

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.reader import Chunk, parse_chunk, parse_line, read_chunks


def lines_of(chunks: list[Chunk]) -> list[tuple[int, bytes]]:
    return [(number, line) for chunk in chunks for number, line in enumerate(chunk.lines, chunk.first_line)]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 20, 10_000])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_lines_keep_their_numbers_in_chunks_of_any_size(
    tmp_path: Path, chunk_bytes: int, ending: str
) -> None:
    content = b"first\n\nthird \xe2\x80\xa8 still third\x0b\x85\n" + b"x" * 50 + b"\nno newline at the end"
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    chunks = list(read_chunks([path], chunk_bytes))
    *whole, last = content.split(b"\n")
    assert lines_of(chunks) == list(enumerate([*(line + b"\n" for line in whole), last], 1))


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n{two}\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei ß".encode()))
    texts = [
        parse_chunk(chunk, ["text"])[0] for chunk in read_chunks([tmp_path / "a.txt", tmp_path / "b.txt.gz"])
    ]
    assert texts == [[["one\n{two}\r\n"]], [["drei ß"]]]


@pytest.mark.parametrize("name", ["absent.jsonl", "folder", "cut.jsonl.gz", "not.gz"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:-12])
    (tmp_path / "not.gz").write_bytes(b"plain")
    with pytest.raises(CorpusError, match=f"{name}: cannot be read"):
        list(read_chunks([tmp_path / name]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON: .* at character 13"),
        (b'{"text": "x"} {"text": "y"}', "not JSON: Extra data"),
        (b"text", "not JSON"),
        (b'"text"', "a JSON str, not an object"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"body": "x"}', 'no key "text"'),
        (b'{"text": null}', '"text" is null, not a text'),
        (b'{"text": 5}', '"text" is a int, not a text'),
        (b'{"text": ["x"]}', '"text" is a list'),
        (b'{"text": "ab\\ud800"}', "half a surrogate pair at character 3"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "integer string"),
    ],
)
def test_bad_lines_have_a_reason(line: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_line(line, ["text"])


def test_whole_surrogate_pairs_and_any_character_are_text() -> None:
    assert parse_line(b'{"text": "\\ud83d\\ude42 \\u2028\\u0000"}', ["text"]) == ["🙂 \u2028\0"]
    assert parse_line(b'{"b": "2", "a": "1", "c": null}', ["a", "b"]) == ["1", "2"]


def test_bad_lines_are_numbered_and_blank_lines_are_nothing() -> None:
    chunk = Chunk("f", 10, [b'{"text": "a"}\n', b" \n", b"{\n", b'{"text": ""}\n', b"}\n"], False)
    documents, problems = parse_chunk(chunk, ["text"])
    assert documents == [["a"], [""]]
    assert [str(problem).split(": ")[0] for problem in problems] == ["f:12", "f:14"]
