"""Damaged files of every format, whatever the damage: a CorpusError or documents and problems, never another error."""

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.reader import read_records

LINES = b'{"text": "some text"}\n{"text": "other"}\n' * 20


def zst() -> bytes:
    compress = pytest.importorskip("zstandard").compress
    return b"".join(map(compress, (LINES, LINES)))


def parquet() -> bytes:
    arrow = pytest.importorskip("pyarrow")
    file = io.BytesIO()
    table = arrow.table({"text": ["a", None, "ü"] * 10, "n": list(range(30))})
    pytest.importorskip("pyarrow.parquet").write_table(table, file, row_group_size=20)
    return file.getvalue()


def warc() -> bytes:
    pytest.importorskip("warcio")
    pytest.importorskip("resiliparse")
    page = b"<html><body><p>A paragraph of a page.</p></body></html>"
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Encoding: gzip\r\n\r\n"
    records = [
        (b"warcinfo", b"software: x\r\n"),
        (b"response", http + gzip.compress(page)),
        (b"response", http + page),
        (b"conversion", b"text"),
    ]
    head = b"WARC/1.0\r\nWARC-Type: %s\r\nWARC-Target-URI: http://a.example\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
    return b"".join(head % (kind, len(body), body) for kind, body in records)


WHOLE = {
    "x.jsonl": lambda: LINES,
    "x.jsonl.gz": lambda: gzip.compress(LINES) * 2,
    "x.jsonl.zst": zst,
    "x.parquet": parquet,
    "x.warc": warc,
    "x.warc.gz": lambda: gzip.compress(warc()),
}
# Where, in shares of the length; what stands there then; how many bytes it takes the place of.
DAMAGE = st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60)
@given(damages=st.lists(DAMAGE, max_size=3), end=st.none() | st.floats(0, 1))
def test_any_damage_is_an_error_or_passes(
    folder: Path, name: str, damages: list[tuple[float, bytes, int]], end: float | None
) -> None:
    data = WHOLE[name]()
    for share, inserted, removed in damages:
        place = int(share * len(data))
        data = data[:place] + inserted + data[place + removed :]
    data = data if end is None else data[: int(end * len(data))]
    (folder / name).write_bytes(data)
    try:
        entries = list(read_records([folder / name]))
    except CorpusError as error:
        assert f"{name}: cannot be read: " in str(error)
        assert damages or end is not None
        return
    if name == "x.jsonl":
        assert len(entries) == sum(bool(line.strip()) for line in data.split(b"\n"))
