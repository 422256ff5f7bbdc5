import json
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.corpus.dedup.pieces import Entry, cut, entries
from megatron_lite.corpus.reader import Problem, Record, read_records

LINES = st.lists(
    st.sampled_from(
        [
            b'{"text": "one"}',
            b'{"text": "\xc3\xbc", "n": 123456789012345678901234567890}',
            b'\xef\xbb\xbf{"text": "mark"}',
            b'{"text": "\\ud800"}',
            b'{"text": "\\ud83d\\ude42"}',
            b'{"text": null}',
            b'{"text": NaN}',
            b'{"texts": ""}',
            b'["text"]',
            b'"text"',
            b'{"text": "cut',
            b"\xff",
            b"",
            b" \r",
            b'{"text": "return"}\r',
            b'{"text": "' + b"long " * 20 + b'"}',
        ]
    ),
    max_size=12,
)


@given(lines=LINES, ending=st.sampled_from([b"", b"\n"]), size=st.integers(1, 80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_hold_what_the_reader_of_all_tools_reads(
    tmp_path: Path, lines: list[bytes], ending: bytes, size: int
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + ending)
    found: list[tuple[int, str]] = []
    first = 0
    for piece in cut([path], size):
        count = None
        for entry in entries(piece, "text"):
            if isinstance(entry, Entry):
                found.append((first + entry.at + 1, entry.text.decode()))
                line = lines[first + entry.at]
                assert entry.line is not None
                assert entry.line.removesuffix(b"\n") in (line, line.removeprefix(b"\xef\xbb\xbf"))
            elif isinstance(entry, Problem):
                found.append((first + entry.line, entry.reason))
            else:
                count = entry
        assert count is not None, "the count comes last"
        first += count
    expected = [
        (record.line, record.content["text"] if isinstance(record, Record) else record.reason)
        for record in read_records([path])
    ]
    assert found == expected


def test_dead_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(9)))
    alive = np.arange(9) % 2 == 0
    (piece,) = cut([path])
    found = [entry.text for entry in entries(piece, "text", alive) if isinstance(entry, Entry)]
    assert found == [b"0", b"2", b"4", b"6", b"8"]
