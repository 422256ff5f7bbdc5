"""A corpus divided over machines comes out byte for byte as from one."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_lite.corpus import CorpusError, EncodeSettings, Shard, encode_corpus, join_shards
from megatron_lite.data import IndexedDataset

SETTINGS = EncodeSettings("byte", ("text", "title"), append_eod=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, size in enumerate((70, 0, 3, 200, 5)):
        lines = "".join(
            json.dumps({"text": f"{number}.{n} " * (n % 7), "title": "t"}) + "\n" for n in range(size)
        )
        if number == 2:
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (folder / f"{number}.jsonl").write_text(lines)
    return folder


def result(prefix: Path) -> list[bytes]:
    return [
        Path(f"{prefix}_{key}_document{end}").read_bytes()
        for key in SETTINGS.keys
        for end in (".bin", ".idx", ".json")
    ]


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_joined_shards_are_the_whole(corpus: Path, tmp_path: Path, count: int) -> None:
    whole = encode_corpus([corpus], tmp_path / "whole", SETTINGS)
    prefix, read, chunk = tmp_path / "o" / "x", 0, 400
    for number in reversed(range(count)):
        read += encode_corpus([corpus], prefix, SETTINGS, shard=Shard(number, count), chunk_bytes=chunk).read
    assert read == whole.read
    parts = [Shard(number, count).of(str(prefix)) for number in range(count)]
    sizes = [IndexedDataset(f"{part}_text_document").num_tokens for part in parts]
    assert count > 3 or min(sizes) > 0.5 * sum(sizes) / count, "shards are about as large as each other"
    merged = join_shards(prefix)
    assert [part.documents for part in merged] == [whole.read] * 2
    assert result(prefix) == result(tmp_path / "whole")


def test_files_that_cannot_be_divided_go_whole_to_one_shard(tmp_path: Path) -> None:
    for number in range(3):
        lines = "".join(json.dumps({"text": f"{number} {n}", "title": "t"}) + "\n" for n in range(90))
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    files = sorted(tmp_path.glob("*.gz"))
    whole = encode_corpus(files, tmp_path / "whole", SETTINGS)
    parts = [encode_corpus(files, tmp_path / "x", SETTINGS, shard=Shard(number, 3)) for number in range(3)]
    assert whole.read == 270 and [part.read for part in parts] == [90, 90, 90]
    join_shards(tmp_path / "x")
    assert result(tmp_path / "x") == result(tmp_path / "whole")


def test_a_missing_or_differing_shard_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="run the shards first"):
        join_shards(tmp_path / "x")
    encode_corpus([corpus], tmp_path / "x", SETTINGS, shard=Shard(0, 3))
    with pytest.raises(CorpusError, match="2 are missing or not finished: 1, 2"):
        join_shards(tmp_path / "x")
    encode_corpus([corpus], tmp_path / "x", SETTINGS, shard=Shard(1, 3))
    encode_corpus([corpus], tmp_path / "x", SETTINGS, shard=Shard(2, 3), on_error="skip")
    with pytest.raises(
        CorpusError, match=r"x-00002-of-00003.manifest.json: settings are not those of .*00000"
    ):
        join_shards(tmp_path / "x")
    with open(corpus / "4.jsonl", "a") as file:
        file.write('{"text": "one more", "title": ""}\n')
    encode_corpus([corpus], tmp_path / "x", SETTINGS, shard=Shard(2, 3))
    with pytest.raises(CorpusError, match="inputs are not those"):
        join_shards(tmp_path / "x")


def test_a_shard_is_written_as_i_of_n() -> None:
    assert Shard.parse("0/1") == (0, 1) and Shard.parse("7/16") == (7, 16)
    for text in ("1/1", "-1/2", "1", "a/b", "2/0", ""):
        with pytest.raises(ValueError, match="I/N"):
            Shard.parse(text)


def test_the_first_documents_are_not_those_of_a_shard(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="shards"):
        encode_corpus([corpus], tmp_path / "x", SETTINGS, shard=Shard(0, 2), max_documents=3)
