import io
import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_lite.corpus.json_lines import (
    dump_line,
    fast_dumper,
    fast_parser,
    line_blocks,
    parse_line,
    text_under,
)


@given(st.lists(st.sampled_from([b"a", b"bb", b"\n", b"\n\n", b"x" * 40])).map(b"".join), st.integers(1, 50))
def test_blocks_are_whole_lines_with_their_numbers(content: bytes, block_bytes: int) -> None:
    blocks = list(line_blocks(io.BytesIO(content), block_bytes))
    assert b"".join(data for _, data in blocks) == content
    number = 1
    for position, (first, data) in enumerate(blocks):
        assert first == number and data
        assert data.endswith(b"\n") or position == len(blocks) - 1
        number += data.count(b"\n")
        # No longer than asked, but for the part of a line carried over.
        assert len(data) <= block_bytes + max(map(len, data.split(b"\n")))


BAD = [
    (b'{"text": "x"', "not JSON: .* at character 13"),
    (b'{"text": "x"} {"text": "y"}', "not JSON: Extra data"),
    (b'{"text": "x"}\r{"text": "y"}', "not JSON: Extra data"),
    (b"text", "not JSON"),
    (b'"text"', "a JSON str, not an object"),
    (b"[1]", "a JSON list, not an object"),
    (b'{"body": "x"}', 'no key "text"; there is "body"'),
    (b'{"a": 1, "b": 2}', 'no key "text"; there are "a", "b"'),
    (b"{}", 'no key "text"; the object is empty'),
    (b'{"text": null}', '"text" is null, not a text'),
    (b'{"text": 5}', '"text" is a int, not a text'),
    (b'{"text": ["x"]}', '"text" is a list'),
    (b'{"text": "ab\\ud800"}', "half a surrogate pair at character 3"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    (b'\xef\xbb\xbf{"text": "\xff"}', "not UTF-8 at byte 14"),
    (b'{"text": "a\0b"}', "not JSON: Invalid control character at.* at character 12"),
    (b"\0" * 20, "not JSON"),
    (b"[" * 100_000, "not JSON: nested too deeply"),
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "integer string"),
]
GOOD = [
    (b'{"text": "\\ud83d\\ude42 \\u2028\\u0000"}', "🙂 \u2028\0"),
    (b'\xef\xbb\xbf{"text": "bom"}', "bom"),
    (b' {"text": "spaces"}\t\r', "spaces"),
    (b'{"text": "x", "n": [NaN, Infinity, 1e999, 18446744073709551616]}', "x"),
    (b'{"text": "x", "other": "\\udc00"}', "x"),
    (b'{"text": "x", "deep": ' + b"[" * 1015 + b"]" * 1015 + b"}", "x"),
    (b'{"text": "1", "text": "2"}', "2"),
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_lines_have_the_same_reason_either_way(line: bytes, reason: str, fast: bool) -> None:
    parse = fast_parser(exact=False) if fast else parse_line
    with pytest.raises(ValueError, match=reason):
        text_under(parse(line), "text")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("line", "text"), GOOD)
def test_good_lines_have_the_same_text_either_way(line: bytes, text: str, fast: bool) -> None:
    parse = fast_parser(exact=False) if fast else parse_line
    assert text_under(parse(line), "text") == text


def outcome(parse: Any, line: bytes) -> Any:
    try:
        return repr(parse(line))  # repr: nan is not itself, 1 is 1.0
    except ValueError as error:
        return str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
LINES = st.one_of(
    st.binary(),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.text(), VALUES).map(lambda value: json.dumps(value, ensure_ascii=False).encode()),
    st.builds(
        lambda value, cut, noise: json.dumps(value, ensure_ascii=False).encode()[:cut] + noise,
        *(st.dictionaries(st.text(), VALUES), st.integers(0, 80), st.binary(max_size=3)),
    ),
)


@given(LINES)
@example(b'{"":-9223372036854775809}')
@example(b'{"": [18446744073709551616, -0, -0.0, 1E400]}')
@example(b'{"": "\\u0000\x7f", "": 1}')
@example(b'{"a": 01}')
@example(b'{"a": "\xed\xa0\x80"}')
def test_orjson_changes_neither_results_nor_reasons(line: bytes) -> None:
    pytest.importorskip("orjson")
    assert outcome(fast_parser(exact=True), line) == outcome(parse_line, line)


TEXTS = st.text() | st.text(st.characters(categories=["Cs", "Cc", "L"]))
CONTENTS = st.dictionaries(TEXTS, st.recursive(VALUES | TEXTS, lambda inner: st.lists(inner), max_leaves=3))


@given(CONTENTS)
def test_orjson_does_not_change_what_is_written(content: dict[str, Any]) -> None:
    pytest.importorskip("orjson")
    line = fast_dumper()(content)
    assert dump_line(content) == line
    assert repr(parse_line(line)) == repr(content) and line.count(b"\n") == 1 and line.endswith(b"\n")


def test_without_orjson_the_standard_library_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert fast_parser(exact=False) is parse_line and fast_dumper() is dump_line
