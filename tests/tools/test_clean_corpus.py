"""tools/clean_corpus.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.corpus.cleaning import CleaningSettings
from tools.clean_corpus import main

ROOT = Path(__file__).resolve().parents[2]

GOOD = "The first of these sentences has to be long enough to count. And that is what they have with them. "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    texts = [
        GOOD
        + "It was followed by others, which said the same thing in other words, until somebody wrote them all "
        "down in a book. Nobody read the book for many years, because it stood on a shelf in the house of a man who "
        "never opened the door to anyone; then, one winter, his nephew found it there.",
        GOOD,
    ]
    path.write_text("".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts))
    return path


def test_the_defaults(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("py3langid")
    out = corpus.with_name("new") / "out.jsonl"
    assert main(["--input", str(corpus), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "documents read 2 = kept 1 + dropped 1 + rejected 0" in printed
    assert f"dropped by gopher_quality.min_words: 1 documents, {len(GOOD)} bytes" in printed
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record == json.loads(corpus.read_text().splitlines()[0])
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["documents"]["kept"] == 1 and report["settings"]["c4"]["min_sentences"] == 3


def test_settings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-settings"]) == 0
    assert json.loads(capsys.readouterr().out) == CleaningSettings().model_dump(mode="json")


def test_exit_statuses(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, out = corpus.with_name("s.json"), corpus.with_name("out.jsonl")
    settings.write_text(json.dumps({"langauge": {}}))
    arguments = ["--input", str(corpus), "--output", str(out), "--settings", str(settings)]
    assert main(arguments) == 2
    assert "error: " in (error := capsys.readouterr().err) and "did you mean language?" in error
    settings.write_text(json.dumps({"language": {"enabled": False}}))
    with open(corpus, "a") as file:
        file.write("{\n")
    assert main(arguments) == 2
    assert f"{corpus}:3: not JSON" in capsys.readouterr().err and not out.exists()
    assert main([*arguments, "--on-error", "skip"]) == 3
    assert "rejected 1" in capsys.readouterr().out and out.exists()
    assert main([*arguments[:1], "absent", *arguments[2:]]) == 2
    for wrong in (["--input", str(corpus)], [*arguments, "--workers", "0"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flag", "place", "message"),
    [
        ("--report", "x.jsonl", "x.jsonl: is among the inputs"),
        ("--report", "x.jsonl/r", "--report {path}: cannot be written: what should be its folder is a file"),
        ("--dropped", "x.jsonl/r", "--dropped {path}: cannot be written"),
        ("--output", ".", "--output {path}: cannot be written: it is a folder"),
        ("--report", "o.jsonl", "--report {path}: named for documents too"),
    ],
)
def test_where_outputs_cannot_be_is_said_before_anything_is_written(
    corpus: Path, capsys: pytest.CaptureFixture[str], flag: str, place: str, message: str
) -> None:
    before = corpus.read_text()
    path = str(corpus.parent / place)
    assert main(["--input", str(corpus), "--output", str(corpus.with_name("o.jsonl")), flag, path]) == 2
    assert message.format(path=path) in capsys.readouterr().err
    assert [entry.name for entry in corpus.parent.iterdir()] == ["x.jsonl"] and corpus.read_text() == before


def test_a_second_run_does_not_read_what_the_first_wrote(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = corpus.parent.with_suffix(".json")
    settings.write_text(json.dumps({"language": {"enabled": False}}))
    out = corpus.with_name("o.jsonl")
    arguments = ["--input", str(corpus.parent), "--output", str(out), "--settings", str(settings)]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert f"error: {out}: is among the inputs" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interruption_is_one_line(corpus: Path, workers: str) -> None:
    """Ctrl-C reaches all processes of the terminal."""
    corpus.write_text(corpus.read_text() * 20_000)
    settings = corpus.with_name("s.json")
    settings.write_text(json.dumps({"language": {"enabled": False}}))
    command = [sys.executable, "-m", "tools.clean_corpus", "--input", str(corpus), "--workers", workers]
    command += ["--output", str(corpus.with_name("o.jsonl")), "--settings", str(settings)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(corpus.parent.glob("o.jsonl.tmp-*")):
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert (error, run.returncode) == ("interrupted: nothing was written\n", 130)
    assert sorted(entry.name for entry in corpus.parent.iterdir()) == ["s.json", "x.jsonl"]


def test_it_starts_without_torch() -> None:
    code = "import sys; import tools.clean_corpus; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
