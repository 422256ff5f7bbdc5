import errno
import gzip
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.files import (
    check_output,
    expand_inputs,
    format_of,
    open_input,
    reading,
    refuse_overwriting,
    writing,
)


def names(folder: Path, inputs: list[str]) -> list[str]:
    found = expand_inputs([folder / entry for entry in inputs])
    assert expand_inputs(found) == found, "expanding again changes nothing"
    return [Path(path).relative_to(folder).as_posix() for path in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.TXT",
        "sub/README.md",
        "sub/.hidden.txt",
        ".git/x.txt",
        "[x].json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["b.jsonl", "a.jsonl.gz", "b.jsonl"], ["b.jsonl", "a.jsonl.gz", "b.jsonl"]),
        (["."], ["[x].json", "a.jsonl.gz", "b.jsonl", "sub/c.TXT"]),
        (["*.jsonl*"], ["a.jsonl.gz", "b.jsonl"]),
        (["sub/*"], ["sub/README.md", "sub/c.TXT"]),
        (["s*"], ["sub/c.TXT"]),
        (["**"], ["[x].json", "a.jsonl.gz", "b.jsonl", "sub/README.md", "sub/c.TXT"]),
        (["[x].json", "sub/README.md"], ["[x].json", "sub/README.md"]),
    ],
)
def test_inputs_are_files_folders_and_globs(folder: Path, inputs: list[str], expected: list[str]) -> None:
    assert names(folder, inputs) == expected


@pytest.mark.parametrize(
    ("name", "reason"), [("none.jsonl", "No such file"), ("*.x", "no file"), ("e", "ending")]
)
def test_an_input_without_files_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "e").mkdir()
    with pytest.raises(CorpusError, match=reason) as caught:
        expand_inputs([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.jsonl", "jsonl"),
        ("x.json.gz", "jsonl"),
        ("x.ndjson.zst", "jsonl"),
        ("x", "jsonl"),
        ("x.gz", "jsonl"),
        ("x.TXT.GZ", "text"),
        ("x.parquet", "parquet"),
        ("x.warc.gz", "warc"),
        ("x.warc.wet.gz", "warc"),
    ],
)
def test_the_format_is_known_by_the_ending(name: str, expected: str) -> None:
    assert format_of(name) == expected


@pytest.mark.parametrize("name", ["x.parquet.gz", "x.jsonl.bz2", "x.tar.gz", "x.zip"])
def test_other_compression_is_refused(name: str) -> None:
    with pytest.raises(CorpusError, match=rf"{name}: .* unpack"):
        format_of(name)


def test_links_in_circles_are_followed_once(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "z").symlink_to(folder / "sub")
    assert names(folder, ["."]) == ["[x].json", "a.jsonl.gz", "b.jsonl", "sub/c.TXT"]


def test_a_folder_that_cannot_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CorpusError, match="Permission denied"):
        expand_inputs([folder])


SIDE_FILES = (
    "d.json",
    "d.bin",
    "d.idx",
    "d-0-of-2.manifest.json",
    "b.jsonl.report.json",
    "d.journal.partial",
    "b.jsonl.tmp-123",
)


@pytest.mark.parametrize("entry", ["sub", "sub/*", "s*"])
def test_what_our_tools_write_is_passed_over_unless_it_is_named(folder: Path, entry: str) -> None:
    before = names(folder, [entry])
    for name in SIDE_FILES:
        (folder / "sub" / name).write_text("{}")
    assert names(folder, [entry]) == before
    named = [f"sub/{name}" for name in SIDE_FILES]
    assert names(folder, named) == named


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sub", "a folder"), ("b.jsonl/x", "is a file"), ("b.jsonl/x/y", "is a file"), ("x" * 253, "too long")],
)
def test_what_cannot_be_written_is_named_with_its_flag(folder: Path, name: str, reason: str) -> None:
    for check, flag in (
        (lambda: check_output(folder / name, "--report"), "--report "),
        (writing(folder / name).__enter__, ""),
    ):
        with pytest.raises(CorpusError, match=f"^{flag}{folder}/{name}: cannot be written: .*{reason}"):
            check()


def test_devices_are_not_replaced() -> None:
    with pytest.raises(CorpusError, match=r"--output /dev/null: cannot be written: .* device"):
        check_output("/dev/null", "--output")


def test_checking_leaves_a_folder_and_no_file(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "x")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(CorpusError, match=f"{tmp_path}/x: cannot be written: No space"),
        writing(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="other"), writing(tmp_path / "x"):
        Path("other").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_an_output_among_the_inputs_is_refused(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "b.jsonl")
    inputs = expand_inputs([folder])
    for name in ("b.jsonl", "link", "sub/../b.jsonl"):
        with pytest.raises(CorpusError, match=rf"{name}: is among the inputs; write to another place"):
            refuse_overwriting(inputs, [None, folder / "new", folder / name])
    refuse_overwriting(inputs, [None, folder / "new"])


def packed(path: Path, parts: list[bytes]) -> Path:
    """A file of several gzip members or zstd frames."""
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, parts)))
    else:
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(b"".join(map(zstandard.compress, parts)))
    return path


PARTS = [b"one\n" * 50_000, b"", b"two", bytes(range(256)) * 300]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_all_members_of_a_file_are_read(tmp_path: Path, ending: str) -> None:
    with open_input(str(packed(tmp_path / f"x{ending}", PARTS))) as file:
        assert file.read(5) == b"one\no"
        assert b"one\no" + file.read() == b"".join(PARTS)


def test_zstd_frames_without_text_are_passed_over(tmp_path: Path) -> None:
    """Written by parallel compressors, as a table of contents for one."""
    zstandard = pytest.importorskip("zstandard")
    skippable = b"\x50\x2a\x4d\x18\x05\0\0\0inner"
    (tmp_path / "x.zst").write_bytes(
        skippable + zstandard.compress(b"one") + skippable + zstandard.compress(b"two")
    )
    with open_input(str(tmp_path / "x.zst")) as file:
        assert file.read() == b"onetwo"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 5, 30, -1])
def test_a_file_cut_short_or_damaged_is_named(tmp_path: Path, ending: str, cut: int) -> None:
    path = packed(tmp_path / f"x{ending}", PARTS)
    path.write_bytes(path.read_bytes()[:-cut] if cut > 0 else b"")
    with pytest.raises(CorpusError, match=rf"x{ending}: cannot be read"), reading(str(path)):
        open_input(str(path)).read()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damage_inside_is_named(tmp_path: Path, ending: str) -> None:
    path = packed(tmp_path / f"x{ending}", [bytes(range(256)) * 300])
    data = bytearray(path.read_bytes())
    data[4 if ending == ".zst" else len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"x{ending}: cannot be read"), reading(str(path)):
        open_input(str(path)).read()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CorpusError, match=r"zstandard: pip install 'megatron_lite\[data\]'"):
        open_input(str(tmp_path / "x.zst"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_writing_is_whole_or_not_at_all(tmp_path: Path, ending: str) -> None:
    if ending == ".zst":
        pytest.importorskip("zstandard")
    path = tmp_path / "o" / f"x.jsonl{ending}"
    for _ in range(2):
        with writing(path) as file:
            file.write(b"good")
    first = path.read_bytes()
    with pytest.raises(KeyError), writing(path) as file:
        file.write(b"bad")
        raise KeyError
    assert path.read_bytes() == first and [entry.name for entry in path.parent.iterdir()] == [path.name]
    with open_input(str(path)) as read:
        assert read.read() == b"good"
    assert ending != ".gz" or first[4:8] == bytes(4), "no time of day in it"
