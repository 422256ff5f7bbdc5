import datetime
import decimal
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.corpus import CorpusError, parquet
from megatron_lite.corpus.reader import Problem, RecordWriter, parse_chunk, read_chunks, read_records

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), path, **settings)
    return path


def texts(path: Path, chunk_bytes: int, order: int = 1, keys: list[str] | None = None) -> list[Any]:
    chunks = list(read_chunks([path], chunk_bytes))[::order]
    found = [parse_chunk(chunk, keys or ["text"]) for chunk in chunks][::order]
    assert not any(problems for _, problems in found)
    return [document for documents, _ in found for document in documents]


TEXTS = [f"ünï {n} " * (n % 7) for n in range(1000)]


@pytest.mark.parametrize("chunk_bytes", [50, 3000, 1 << 20])
@pytest.mark.parametrize("group", [1, 64, 1000])
@pytest.mark.parametrize("order", [1, -1])
def test_rows_are_read_in_ranges_in_any_order(
    tmp_path: Path, chunk_bytes: int, group: int, order: int
) -> None:
    path = write(tmp_path / "x.parquet", {"n": range(200), "text": TEXTS[:200]}, row_group_size=group)
    assert texts(path, chunk_bytes, order) == [[text] for text in TEXTS[:200]]
    assert [chunk.first for chunk in read_chunks([path], 1 << 30)] == list(range(1, 201, group))


def test_ranges_of_a_large_row_group_are_read_in_one_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": TEXTS}, use_dictionary=False)
    chunks = list(read_chunks([path], 1000))
    assert len(chunks) > 10 and sum(chunk.size for chunk in chunks) > 10_000
    # Every second range, as one of two workers sees them; then the file changes.
    some = [parse_chunk(chunk, ["text"])[0] for chunk in chunks[::2]]
    firsts = [chunk.first for chunk in chunks] + [1001]
    expected = [[[text] for text in TEXTS[a - 1 : b - 1]] for a, b in pairwise(firsts)]
    assert some == expected[::2]
    write(path, {"text": TEXTS[::-1]}, use_dictionary=False)
    assert parse_chunk(chunks[1], ["text"])[0] == [
        [text] for text in TEXTS[::-1][firsts[1] - 1 : firsts[2] - 1]
    ]


@pytest.mark.parametrize("group", [100, 450, 1000])
def test_ranges_that_overtake_each_other_are_decoded_once(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads take them: each a little earlier or later than its place, also where two row groups meet."""
    path = write(tmp_path / "x.parquet", {"text": TEXTS}, use_dictionary=False, row_group_size=group)
    decoded, batches = [], parquet._batches

    def counted(*arguments: Any) -> Iterator[Any]:
        for batch in batches(*arguments):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(parquet, "_batches", counted)
    chunks = list(read_chunks([path], 500))
    assert len(chunks) > 20
    draw = random.Random(3)
    found = {}
    for number in sorted(range(len(chunks)), key=lambda number: number + draw.uniform(0, 6)):
        found[number] = parse_chunk(chunks[number], ["text"])[0]
    assert [row for number in range(len(chunks)) for row in found[number]] == [[text] for text in TEXTS]
    assert sum(decoded) == 1000

    with ThreadPoolExecutor(8) as pool:
        again = [
            row for rows, _ in pool.map(lambda chunk: parse_chunk(chunk, ["text"]), chunks) for row in rows
        ]
    assert again == [[text] for text in TEXTS]


def test_several_keys_are_columns_in_the_order_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"a": ["1", "2"], "b": ["3", "4"], "c": [None, "5"]})
    assert texts(path, 1000, keys=["b", "a"]) == [["3", "1"], ["4", "2"]]


def test_rows_without_a_text_are_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["a", None, ""], "n": [1, 2, 3]})
    [chunk] = read_chunks([path])
    assert parse_chunk(chunk, ["text"]) == (
        [["a"], [""]],
        [Problem(str(path), 2, '"text" is null, not a text')],
    )
    assert [problem.reason for problem in parse_chunk(chunk, ["n"])[1]] == ['"n" is a int, not a text'] * 3
    assert [problem.reason for problem in parse_chunk(chunk, ["x"])[1]] == ['no key "x"'] * 3


def test_a_column_that_is_not_there_is_missing_in_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": TEXTS}, use_dictionary=False)
    chunks = list(read_chunks([path], 1000))
    problems = [problem for chunk in chunks for problem in parse_chunk(chunk, ["x"])[1]]
    assert len(chunks) > 10 and [problem.line for problem in problems] == list(range(1, 1001))


def test_invalid_utf8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    column = pa.array([b"a", b"b\xff", b"c"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(3, *column.buffers()[1:])
    path = write(tmp_path / "x.parquet", {"text": column})
    [chunk] = read_chunks([path])
    assert parse_chunk(chunk, ["text"]) == ([["a"], ["c"]], [Problem(str(path), 2, "not UTF-8 at byte 2")])


def test_whole_rows_pass_through_to_json(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    columns = {
        "text": ["a"],
        "n": [2**62],
        "tags": [["x", "y"]],
        "at": [moment],
        "price": [decimal.Decimal("1.50")],
    }
    path = write(tmp_path / "x.parquet", columns)
    with RecordWriter(tmp_path / "x.jsonl") as writer:
        for record in read_records([path]):
            writer.write(record.content)  # type: ignore[union-attr]
    [found] = read_records([tmp_path / "x.jsonl"])
    plain = {"at": "2024-01-02T03:04:05", "price": "1.50"}
    assert found[2] == {"text": "a", "n": 2**62, "tags": ["x", "y"], **plain}  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("cut", [1, 10, 200, -1])
def test_a_damaged_file_is_named(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "x.parquet", {"text": TEXTS}, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-cut] if cut > 0 else data[:50] + bytes(300) + data[350:])
    with pytest.raises(CorpusError, match=r"x\.parquet: cannot be read"):
        list(read_records([path]))
