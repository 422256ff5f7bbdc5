"""A run that is killed at any moment is continued by the same call, and ends with the same bytes."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.corpus import CorpusError, EncodeSettings, encode_corpus
from megatron_lite.corpus import encode as encode_module
from megatron_lite.corpus.journal import Journal
from megatron_lite.data import IndexedDatasetWriter, read_sidecar

SETTINGS = EncodeSettings("byte", ("text", "title"), append_eod=True)
ENDS = (".bin", ".idx", ".json")


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Two files, an empty and a bad document among them."""
    made = []
    for name in ("a", "b"):
        lines = [
            json.dumps({"text": f"{name}{n} " * (n % 9), "title": "t" * (n % 2)}) + "\n" for n in range(120)
        ]
        lines.insert(50, "bad\n")
        made.append(tmp_path / f"{name}.jsonl")
        made[-1].write_text("".join(lines))
    return made


def run(corpus: list[Path], prefix: Path, **options: Any) -> Any:
    return encode_corpus(
        corpus, prefix, SETTINGS, on_error="skip", chunk_bytes=1500, journal_seconds=0, **options
    )


def files(prefix: Path) -> dict[str, bytes]:
    return {
        f"{key}{end}": Path(f"{prefix}_{key}_document{end}").read_bytes()
        for key in SETTINGS.keys
        for end in ENDS
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def count_moments(at: int | None) -> list[str]:
    """Note each call that changes a file; at call number `at` the process kills itself."""
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(name)
            return call(*arguments, **options)

        setattr(owner, name, watched)

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (Path, "unlink"),
        (Journal, "add"),
        (IndexedDatasetWriter, "add_documents"),
        (IndexedDatasetWriter, "_flush"),
    ):
        watch(owner, name)
    return seen


def killed_run(corpus: list[Path], prefix: Path, at: int | None) -> None:
    seen = count_moments(at)
    run(corpus, prefix)
    prefix.with_name("moments").write_text(str(len(seen)))


def in_child(*arguments: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=killed_run, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def test_kill_9_at_any_moment_then_the_same_bytes(corpus: list[Path], tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole" / "x")
    assert in_child(corpus, tmp_path / "count" / "x", None) == 0
    moments = int((tmp_path / "count" / "moments").read_text())
    assert moments > 100
    last = [moments - number for number in range(1, 16)]  # files are put in place there
    for number, at in enumerate([*random.Random(4).sample(range(moments), 20), *last]):
        prefix = tmp_path / str(number) / "x"
        assert in_child(corpus, prefix, at) == -signal.SIGKILL
        stats = run(corpus, prefix)
        assert files(prefix) == files(tmp_path / "whole" / "x"), f"killed at moment {at} of {moments}"
        assert names(prefix.parent) == names(tmp_path / "whole"), "nothing is left"
        assert (stats.read, stats.rejected, stats.keys, stats.input_bytes) == (
            (whole.read, whole.rejected, whole.keys, whole.input_bytes)
        )


def test_kill_9_again_and_again(corpus: list[Path], tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole" / "x")
    prefix = tmp_path / "o" / "x"
    kills = 0
    while in_child(corpus, prefix, 25) != 0:
        kills += 1
        assert kills < 100, "no progress from one run to the next"
    assert kills > 3 and files(prefix) == files(tmp_path / "whole" / "x")


def test_kill_9_by_the_clock(corpus: list[Path], tmp_path: Path) -> None:
    begin = time.monotonic()
    run(corpus, tmp_path / "whole" / "x")
    seconds = time.monotonic() - begin
    fork, draw = multiprocessing.get_context("fork"), random.Random(7)
    for number in range(5):
        prefix = tmp_path / str(number) / "x"
        child = fork.Process(target=run, args=(corpus, prefix))
        child.start()
        time.sleep(draw.uniform(0, 1.2 * seconds))
        child.kill()
        child.join()
        run(corpus, prefix)
        assert files(prefix) == files(tmp_path / "whole" / "x")


def interrupt(corpus: list[Path], prefix: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leave a run after its third chunk."""
    write, calls = encode_module._write, []

    def stopping(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode_module, "_write", stopping)
        run(corpus, prefix, **options)


def chunks_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with a number for every chunk that is encoded from now on."""
    calls: list[int] = []
    write = encode_module._write
    monkeypatch.setattr(encode_module, "_write", lambda *a: calls.append(1) or write(*a))
    return calls


def test_what_is_done_is_not_done_again(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = chunks_of(monkeypatch)
    run(corpus, tmp_path / "whole" / "x")
    chunks = len(calls)
    interrupt(corpus, tmp_path / "o" / "x", monkeypatch)
    spent = json.loads((tmp_path / "o" / "x.journal.partial").read_text().splitlines()[-1])["stats"][
        "seconds"
    ]
    calls.clear()
    stats = run(corpus, tmp_path / "o" / "x", workers=2)  # workers may change
    assert stats.seconds > spent > 0
    assert len(calls) == chunks - 3
    assert files(tmp_path / "o" / "x") == files(tmp_path / "whole" / "x")


@pytest.mark.parametrize("change", ["input", "another input", "settings"])
def test_a_change_is_refused_unless_it_is_to_start_anew(
    corpus: list[Path], tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "o" / "x"
    interrupt(corpus, prefix, monkeypatch)
    inputs, options, said = corpus, {}, ""
    if change == "input":
        os.utime(corpus[1], ns=(1, 1))
        said = rf"inputs was \['{corpus[1]}', .* and is \['{corpus[1]}', \d+, 1\]\. "
    elif change == "another input":
        inputs, said = corpus[:1], rf"inputs was \['{corpus[1]}', .* and is None\. "
    else:
        options["max_documents"] = 1000
        said = r"that differs: max_documents was None and is 1000\. .*--restart"
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(CorpusError, match=said):
        run(inputs, prefix, **options)
    assert before == {path: path.read_bytes() for path in prefix.parent.iterdir()}
    run(inputs, prefix, **options, restart=True)
    run(inputs, tmp_path / "whole" / "x")
    assert files(prefix) == files(tmp_path / "whole" / "x")


def test_a_run_that_has_done_nothing_yet_holds_nobody_up(tmp_path: Path) -> None:
    Journal(tmp_path / "x", {"a": 1}).__exit__(None, None, None)
    assert Journal(tmp_path / "x", {"a": 2}).last is None


@pytest.mark.parametrize("change", ["restart", "damaged journal", "torn journal"])
def test_what_cannot_go_on_starts_anew(
    corpus: list[Path], tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    prefix = tmp_path / "o" / "x"
    interrupt(corpus, prefix, monkeypatch)
    journal = tmp_path / "o" / "x.journal.partial"
    options: dict[str, Any] = {}
    if change == "restart":
        options["restart"] = True
    elif change == "damaged journal":
        journal.write_bytes(b"{\n" + journal.read_bytes())
    else:
        journal.write_bytes(journal.read_bytes()[:20])
    calls = chunks_of(monkeypatch)
    run(corpus, prefix, **options)
    anew = len(calls)
    calls.clear()
    run(corpus, tmp_path / "whole" / "x")
    assert anew == len(calls) and files(prefix) == files(tmp_path / "whole" / "x")
    assert ("damaged" in caplog.text) == (change == "damaged journal")


def test_what_a_kill_tears_and_what_was_another_run_do_not_count(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, prefix = tmp_path / "whole" / "x", tmp_path / "o" / "x"
    calls = chunks_of(monkeypatch)
    run(corpus, whole)
    chunks = len(calls)
    interrupt(corpus, prefix, monkeypatch, max_documents=1000)
    interrupt(corpus, prefix, monkeypatch, restart=True)
    with open(tmp_path / "o" / "x.journal.partial", "ab") as file:
        file.write(b'{"file": 1, "chu')
    caplog.clear()
    interrupt(corpus, prefix, monkeypatch)
    calls.clear()
    run(corpus, prefix)
    assert len(calls) == chunks - 6 and "anew" not in caplog.text and files(prefix) == files(whole)


def test_unfinished_files_of_other_hands_are_refused(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "o" / "x"
    interrupt(corpus, prefix, monkeypatch)
    Path(f"{prefix}_text_document.bin.partial").write_bytes(b"")
    with pytest.raises(CorpusError, match="--restart starts anew"):
        run(corpus, prefix)
    run(corpus, prefix, restart=True)


def test_two_runs_do_not_write_at_once(corpus: list[Path], tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "x", {"a": 1}) as journal,
        pytest.raises(CorpusError, match="another process is writing"),
    ):
        run(corpus, tmp_path / "x")
    journal.remove()
    run(corpus, tmp_path / "x")
    assert read_sidecar(tmp_path / "x_text_document") is not None


def test_a_lock_on_a_file_that_is_gone_holds_nobody_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run ends between our open and our lock."""
    lock, calls = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not calls:
            (tmp_path / "x.journal.partial").unlink()
        calls.append(1)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(tmp_path / "x", {"a": 1}), pytest.raises(CorpusError, match="another process is writing"):
        Journal(tmp_path / "x", {"a": 1})
    assert len(calls) == 3


def test_the_first_documents_stay_the_first_after_an_interruption(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = corpus[1].read_text().splitlines(keepends=True)
    corpus[1].write_text("".join([*lines[:20], "bad\n" * 500, *lines[20:]]))  # chunks without a document
    wanted = 125
    whole = run(corpus, tmp_path / "whole" / "x", max_documents=wanted)

    def interrupted(writer: IndexedDatasetWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(IndexedDatasetWriter, "finish", interrupted)
        run(corpus, tmp_path / "o" / "x", max_documents=wanted)
    stats = run(corpus, tmp_path / "o" / "x", max_documents=wanted)
    assert (stats.read, stats.rejected, stats.keys) == (whole.read, whole.rejected, whole.keys)
    assert stats.read - stats.rejected == wanted
    assert files(tmp_path / "o" / "x") == files(tmp_path / "whole" / "x")
