"""tools/train_tokenizer.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.tokenizers import load_tokenizer
from tools.train_tokenizer import files_of, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    texts = [f"the cat number {number} sat on the mat of naïve café {number % 7}\n" for number in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_train_and_compare(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.with_name("new") / "bpe.json"
    arguments = (
        f"--input {corpus} --kind bpe --vocab-size 300 --output {out} --special-tokens <|im|> --compare byte"
    )
    assert main([*arguments.split(), "--held-out-share", "0.1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"hf:{out}: 400 documents, ") and printed[0].endswith("held out; rejected 0")
    held_out = int(printed[0].split()[3])
    assert printed[1] == "special token <|im|>: id 1" and 20 < held_out < 60
    assert printed[2].startswith(f"measured on {held_out} documents, ")
    rows = [line.split() for line in printed[-2:]]
    assert rows[0][:2] == [f"hf:{out}", "300"] and float(rows[0][2]) > 2 and rows[0][5] == "100.00%"
    assert rows[1][:3] == ["byte", "257", "1.000"]
    assert load_tokenizer(f"hf:{out}").vocab_size == 300


def test_other_files_can_be_held_out(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = corpus.with_name("other.txt")
    other.write_text("the bag")
    arguments = f"--input {corpus} --kind char --output {corpus.with_name('c.json')} --held-out {other}"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "400 documents; rejected 0" in printed and "measured on 1 documents, 7 bytes, 2 words" in printed
    assert f"does not give back {other}:1: character 7: 'the bag' came back as 'the ba\ufffd'" in printed


def test_only_compare(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input", str(corpus), "--compare", "byte"]) == 0
    assert "measured on 400 documents" in capsys.readouterr().out


def test_bytes_are_only_measured(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input", str(corpus), "--kind", "byte", "--held-out-share", "0.05"]) == 0
    assert "100.00%" in capsys.readouterr().out


def test_one_document_is_measured_on_what_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text("some text")
    assert main(f"--input {tmp_path}/x.txt --kind char --output {tmp_path}/c.json".split()) == 0
    assert "measured on text that was trained on" in capsys.readouterr().out


def test_exit_statuses(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.with_name("o.json")
    good = f"--input {corpus} --kind bpe --vocab-size 300 --output {out}".split()
    with open(corpus, "a") as file:
        file.write("{\n")
    for arguments, message in (
        (good, f"{corpus}:401: not JSON"),
        ([*good, "--vocab-size", "20"], "at least 257"),
        ([*good, "--compare", "bite"], 'unknown tokenizer "bite"'),
        (["--input", "absent", *good[2:]], "absent"),
        ([*good, "--held-out", "absent"], "absent"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, arguments
        assert not out.exists()
    assert main([*good, "--on-error", "skip"]) == 3 and out.exists()
    assert "rejected 1" in capsys.readouterr().out
    for wrong in (["--input", str(corpus)], [*good, "--held-out-share", "1"], [*good, "--kind", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_no_input_is_overwritten(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, vocabulary = corpus.with_name("other.txt"), corpus.with_name("c.json")
    other.write_text("the bag")
    start = ["--input", str(corpus), "--kind", "char", "--output"]
    assert main([*start, str(vocabulary)]) == 0
    for path, more in (
        (corpus, []),
        (other, ["--held-out", str(other)]),
        (vocabulary, ["--compare", f"char:{vocabulary}"]),
        (vocabulary, ["--compare", str(vocabulary)]),
    ):
        before = path.read_bytes()
        assert main([*start, str(path), *more]) == 2
        assert (
            f"error: {path}: is among the inputs" in capsys.readouterr().err and path.read_bytes() == before
        )
    assert main([*start, str(vocabulary)]) == 0, "an old result is replaced"


def test_the_files_of_a_tokenizer(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "hf/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    both = [tmp_path / "vocab.json", tmp_path / "merges.txt"]
    assert files_of("byte") == []
    assert files_of(f"hf:{tmp_path}/hf") == files_of(f"{tmp_path}/hf") == [tmp_path / "hf" / "tokenizer.json"]
    assert files_of(f"gpt2:{tmp_path}") == files_of(str(tmp_path)) == both


def test_an_output_that_cannot_be_written_is_named_before_training(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(corpus, "a") as file:
        file.write("{\n")  # training would stop here
    for kind in ("char", "word", "bpe", "sentencepiece-bpe"):
        path = corpus / "o.json"
        assert main(f"--input {corpus} --kind {kind} --vocab-size 300 --output {path}".split()) == 2
        assert capsys.readouterr().err.startswith(
            f"error: --output {path}: cannot be written: what should be"
        )


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-unigram"])
def test_an_interruption_is_one_line_and_does_not_wait_for_a_library(tmp_path: Path, kind: str) -> None:
    """Ctrl-C reaches all processes of the terminal. BPE takes minutes for a word of so many letters."""
    source, out = tmp_path / "x.txt", tmp_path / "new" / "o"
    letters = str.maketrans("0123456789", "ghijklmnop")
    words = [f"{number * 7919 % 1_000_003:x}".translate(letters) for number in range(500_000)]
    source.write_text(("" if kind == "bpe" else " ").join(words))
    command = [sys.executable, "-m", "tools.train_tokenizer", "--input", str(source), "--kind", kind]
    command += ["--vocab-size", "30000", "--output", str(out), "--held-out-share", "0"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not out.parent.exists():  # made before training
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)
    try:
        error = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert (error, run.returncode) == ("interrupted: nothing was written\n", 130)
    assert list(out.parent.iterdir()) == []


def test_it_starts_without_torch() -> None:
    code = "import sys; import tools.train_tokenizer; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
