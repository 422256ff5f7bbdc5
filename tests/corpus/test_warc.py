import gzip
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.reader import parse_chunk, parse_records, read_chunks, read_records

pytest.importorskip("warcio")
pytest.importorskip("resiliparse")

PAGE = """<html><head><title>Title</title>{head}</head><body><nav><a href="/">Home</a> <a href="/x">More</a></nav>
<main><h1>Heading</h1><p>{text}</p></main><footer>Imprint</footer></body></html>"""
LONG = "A paragraph that is long enough to be the content of a page, ünï and all, with several words in it."


def record(kind: str, body: bytes, url: str = "https://a.example/") -> bytes:
    headers = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-02T03:04:05Z\r\n"
    )
    return f"{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def response(body: bytes, kind: str = "text/html", status: str = "200 OK", more: str = "") -> bytes:
    return record("response", f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}\r\n".encode() + body)


def html(text: str = LONG, encoding: str = "utf-8", head: str = "") -> bytes:
    return PAGE.format(text=text, head=head).encode(encoding)


def write(path: Path, records: list[bytes]) -> Path:
    """As Common Crawl does: a gzip member for each record."""
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, records)))
    elif path.suffix == ".zst":
        path.write_bytes(b"".join(map(pytest.importorskip("zstandard").compress, records)))
    else:
        path.write_bytes(b"".join(records))
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_the_main_text_of_pages_is_read(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        record("warcinfo", b"software: x\r\n"),
        record("request", b"GET / HTTP/1.1\r\n\r\n"),
        response(html()),
        response(b"\x89PNG", "image/png"),
        response(html(), status="404 Not Found"),
        response(b"", "text/html; charset=utf-8"),
        record("metadata", b"x: y\r\n"),
    ]
    path = write(tmp_path / f"x.warc{ending}", records)
    with caplog.at_level(logging.INFO):
        found: list[Any] = list(read_records([path]))
    assert [(entry.path, entry.line) for entry in found] == [(str(path), 3), (str(path), 6)]
    content = found[0].content
    assert (content["url"], content["date"]) == ("https://a.example/", "2024-01-02T03:04:05Z")
    assert LONG in content["text"] and "Imprint" not in content["text"] and "<" not in content["text"]
    assert found[1].content["text"] == ""
    assert "5 of 7 records passed over: 1 metadata, 1 request, 1 response of type image/png, " in caplog.text
    [chunk] = read_chunks([path])
    assert parse_chunk(chunk, ["text", "url"])[0][0] == [content["text"], "https://a.example/"]


@pytest.mark.parametrize(
    ("kind", "encoding", "head"),
    [
        ("text/html; charset=UTF-8", "utf-8", ""),
        ("text/html;charset='iso-8859-1'", "latin-1", ""),
        ("text/html", "latin-1", '<meta charset="iso-8859-1">'),
        ("text/html", "utf-8", ""),
        ("application/xhtml+xml; charset=nonsense", "utf-8", ""),
    ],
)
def test_the_encoding_is_the_one_named_or_seen(tmp_path: Path, kind: str, encoding: str, head: str) -> None:
    write(tmp_path / "x.warc", [response(html(encoding=encoding, head=head), kind)])
    [found] = list(read_records([tmp_path], "body"))
    assert LONG in found.content["body"]


def test_an_encoding_that_cannot_be_seen_is_taken_from_the_server(tmp_path: Path) -> None:
    page = html(LONG.replace("ünï", "ő"), "iso-8859-2")  # the same bytes are õ in another encoding
    write(tmp_path / "x.warc", [response(page, "text/html; charset=ISO-8859-2")])
    [found] = list(read_records([tmp_path]))
    assert "ő" in found.content["text"]


def test_compressed_pages_are_unpacked_or_a_problem(tmp_path: Path) -> None:
    from warcio.bufferedreaders import BufferedReader

    packed = response(gzip.compress(html()), more="Content-Encoding: gzip\r\n")
    chunked = response(b"5\r\n<html\r\n1\r\n>\r\n0\r\n\r\n", more="Transfer-Encoding: chunked\r\n")
    other = response(b"...", more="Content-Encoding: zstd\r\n")
    write(tmp_path / "x.warc", [packed, chunked, other])
    [chunk] = read_chunks([tmp_path])
    documents, problems = parse_chunk(chunk, ["text"])
    assert LONG in documents[0][0]
    if "zstd" not in BufferedReader.get_supported_decompressors():
        assert [(problem.line, problem.reason[:26]) for problem in problems] == [
            (3, "a page compressed as zstd,")
        ]


def test_pages_nested_too_deeply_are_problems_and_large_ones_are_not(tmp_path: Path) -> None:
    """Looking for the main content of the first would take minutes."""
    deep = response(b"<div>" * 100_000 + LONG.encode())
    large = response(html(f"{LONG}</p><p>" * 4000))
    deep_enough = response(b"<div>" * 2000 + LONG.encode() + b"</div>" * 2000)
    write(tmp_path / "x.warc", [deep, large, deep_enough])
    entries: list[Any] = list(read_records([tmp_path]))
    assert (entries[0].line, entries[0].reason) == (1, "HTML nested more than 5,000 deep")
    assert entries[1].content["text"].count(LONG) == 4000 and LONG in entries[2].content["text"]


def test_wet_is_text_already(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.warc.wet.gz",
        [record("warcinfo", b"x"), record("conversion", "Grüße\n".encode()), record("conversion", b"a\xff")],
    )
    entries: list[Any] = [entry for chunk in read_chunks([path]) for entry in parse_records(chunk)]
    assert entries[0].content["text"] == "Grüße\n" and entries[0].line == 2
    assert (entries[1].line, entries[1].reason) == (3, "not UTF-8 at byte 2")


def test_runs_of_pages_end_by_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.wet", [record("conversion", b"%d " % n * 20) for n in range(600)])
    for chunk_bytes in (100, 1 << 20):
        chunks = list(read_chunks([path], chunk_bytes))
        numbers = [page.number for chunk in chunks for page in chunk.data]
        assert numbers == list(range(1, 601)) and [chunk.first for chunk in chunks] == [
            chunk.data[0].number for chunk in chunks
        ]
        assert max(len(chunk.data) for chunk in chunks) == (256 if chunk_bytes > 100 else 3)


@pytest.mark.parametrize("cut", [1, 6, 20, 60, 200, 329, 400])
@pytest.mark.parametrize("kind", ["conversion", "response", "request"])
def test_a_file_cut_short_is_an_error(tmp_path: Path, cut: int, kind: str) -> None:
    whole = record("conversion", b"first") + record(kind, b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n" + b"x" * 300)
    (tmp_path / "x.wet").write_bytes(whole[:-cut])
    if cut <= 4:  # the blank lines after the last record say nothing
        assert list(read_records([tmp_path]))
    else:
        with pytest.raises(CorpusError, match=r"x\.wet: cannot be read: .*record [12]"):
            list(read_records([tmp_path]))


@pytest.mark.parametrize("data", [b"no WARC at all\n", b"\0" * 1000, b"WARC/1.0\r\n\r\n"])
def test_what_is_no_warc_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.warc").write_bytes(data)
    with pytest.raises(CorpusError, match=r"x\.warc: cannot be read"):
        list(read_records([tmp_path]))


def test_a_wrong_length_is_an_error(tmp_path: Path) -> None:
    first = record("conversion", b"first").replace(b"Content-Length: 5", b"Content-Length: 3")
    (tmp_path / "x.wet").write_bytes(first + record("conversion", b"second") * 2)
    with pytest.raises(CorpusError, match="record 1 does not end where"):
        list(read_records([tmp_path]))
