"""Common Crawl's WARC (web pages) and WET (their text): warcio reads the records, resiliparse finds the text."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from megatron_lite.corpus.files import CorpusError, require

logger = logging.getLogger(__name__)

_MAX_RECORDS = 256  # of one run
_MAX_PAGE_BYTES = 1 << 26  # Common Crawl itself cuts pages off at 1 MiB
_CODINGS = ("br", "zstd", "compress")
_CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s"';]+)""", re.IGNORECASE)
_DEEPEST = 5000  # browsers stop at 512
_HTML = ("text/html", "application/xhtml+xml")


class Page(NamedTuple):
    """A record that holds text. charset: of HTML, as the server named it ("": it did not); None: text in UTF-8.
    payload: its bytes, or the reason why it cannot be read."""

    number: int
    url: str
    date: str
    charset: str | None
    payload: bytes | str


def page_runs(path: str, file: BinaryIO, run_bytes: int) -> Iterator[tuple[int, list[Page]]]:
    """(number of its first record in the file, from 1; up to 256 pages of about `run_bytes`).

    Pages are the HTML responses with a status of 2xx, and the text of WET's conversion records. Other records are
    passed over; the log says how many of which kind.
    """
    run: list[Page] = []
    size = 0
    for page in _pages(path, file):
        run.append(page)
        size += len(page.payload)
        if size >= run_bytes or len(run) >= _MAX_RECORDS:
            yield run[0].number, run
            run, size = [], 0
    if run:
        yield run[0].number, run


def page_content(page: Page, text_key: str) -> dict[str, Any]:
    """{text_key, "url", "date"}; the text is that of the main content, "" where a page has none.

    Raises ValueError with the reason where the page cannot be read."""
    if isinstance(page.payload, str):
        raise ValueError(page.payload)
    if page.charset is None:
        try:
            text = page.payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    else:
        text = _html_text(page.payload, page.charset)
    return {"url": page.url, "date": page.date, text_key: text}


def _html_text(html: bytes, charset: str) -> str:
    encoding = require("resiliparse.parse.encoding", "text out of HTML")
    tree_of = require("resiliparse.parse.html", "text out of HTML").HTMLTree.parse
    extract = require("resiliparse.extract.html2text", "text out of HTML").extract_plain_text
    name = encoding.map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    name = name or encoding.detect_encoding(html, from_html_meta=True)
    tree = tree_of(encoding.bytes_to_str(html, name))
    # The time that looking for the main content takes grows with the square of the depth.
    if html.count(b"<") > _DEEPEST and _too_deep(tree):
        raise ValueError(f"HTML nested more than {_DEEPEST:,} deep")
    return str(extract(tree, main_content=True))


def _too_deep(tree: Any) -> bool:
    depth = 0
    node = tree.document
    while node is not None and depth <= _DEEPEST:
        child = node.first_child
        if child is not None:
            node, depth = child, depth + 1
            continue
        while node is not None and node.next is None:
            node, depth = node.parent, depth - 1
        node = node and node.next
    return node is not None


def _pages(path: str, file: BinaryIO) -> Iterator[Page]:
    archive = require("warcio.archiveiterator", "a WARC or WET file")
    failed = require("warcio.exceptions", "a WARC or WET file").ArchiveLoadFailed
    # HTTP headers are parsed here: in warcio a record that ends before them ends the file, without an error.
    records = archive.ArchiveIterator(file, no_record_parse=True, check_digests=False)
    passed_over: Counter[str] = Counter()
    number = 0
    while True:
        try:
            record = next(records, None)
        except failed as error:
            raise CorpusError(
                f"{path}: cannot be read: after record {number:,} no WARC record: {error}"
            ) from None
        if records.err_count:
            raise CorpusError(
                f"{path}: cannot be read: record {number:,} does not end where its Content-Length says"
            )
        if record is None:
            break
        number += 1
        page = _page(number, record, records.loader)
        _check_whole(path, number, record)
        if isinstance(page, Page):
            yield page
        else:
            passed_over[page] += 1
    if passed_over:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed_over.items()))
        logger.info(
            "%s: %s of %s records passed over: %s", path, f"{passed_over.total():,}", f"{number:,}", kinds
        )


def _page(number: int, record: Any, loader: Any) -> Page | str:
    """The page in a record, or what kind of record it is instead."""
    headers = record.rec_headers
    url, date = (headers.get_header(name) or "" for name in ("WARC-Target-URI", "WARC-Date"))
    if record.rec_type == "conversion":
        return Page(number, url, date, None, _limited(record.raw_stream))
    if record.rec_type != "response":
        return str(record.rec_type)
    try:
        http = loader.load_http_headers(record.rec_type, url, record.raw_stream, record.length)
    except EOFError:
        http = None
    if http is None:
        return "response without HTTP headers"
    if not (http.get_statuscode() or "").startswith("2"):
        return f"response with status {http.get_statuscode()}"
    kind, _, parameters = (http.get_header("Content-Type") or "").partition(";")
    if kind.strip().lower() not in _HTML:
        return f"response of type {kind.strip().lower() or 'unknown'}"
    charset = _CHARSET.search(parameters)
    record.http_headers = http
    coding = (http.get_header("Content-Encoding") or "").lower()
    supported = require("warcio.bufferedreaders", "a WARC file").BufferedReader.get_supported_decompressors()
    if coding in _CODINGS and coding not in supported:
        payload: bytes | str = f"a page compressed as {coding}, which is not read here"
    else:
        payload = _limited(record.content_stream())
    return Page(number, url, date, charset[1] if charset else "", payload)


def _limited(stream: Any) -> bytes | str:
    data: bytes = stream.read(_MAX_PAGE_BYTES + 1)
    return data if len(data) <= _MAX_PAGE_BYTES else f"a page of more than {_MAX_PAGE_BYTES:,} bytes"


def _check_whole(path: str, number: int, record: Any) -> None:
    if record.rec_headers.get_header("Content-Length") is None:
        raise CorpusError(
            f"{path}: cannot be read: record {number:,} has no Content-Length; is the file cut short?"
        )
    while record.raw_stream.read(1 << 16):
        pass
    if record.raw_stream.limit:
        raise CorpusError(f"{path}: cannot be read: record {number:,} is cut short")
