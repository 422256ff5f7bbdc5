import gzip
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_lite.corpus import CorpusError
from megatron_lite.corpus.dedup import Decontaminate, Exact, Lines, MinHash, Substrings, dedup_corpus
from megatron_lite.corpus.dedup.run import workspace
from megatron_lite.corpus.reader import read_records
from tests.corpus.dedup.case import run, write_lines

ROOT = Path(__file__).resolve().parents[3]


def mixed(folder: Path) -> tuple[list[str], list[object]]:
    """A text for every rule, and all rules."""
    block = " ".join(f"block{number}" for number in range(60))
    texts = [" ".join(f"{number}{letter}" for letter in "abcdefghi") + "\nend" for number in range(60)]
    texts[10] = texts[3]
    texts[20] += "\na line that is long enough to be looked at, by far"
    texts[21] += "\na line that is long enough to be looked at, by far"
    texts[30] = f"one {block} two"
    texts[31] = f"three {block} four"
    texts[40] = " ".join(f"near{number}" for number in range(300))
    texts[41] = " ".join(f"{'far' if number % 20 == 0 else 'near'}{number}" for number in range(300))
    texts[50] = "what is the airspeed velocity of an unladen swallow"
    evaluations = folder / "evaluations.txt"
    evaluations.write_text(texts[50])
    return texts, [Exact(), Lines(), Substrings(), MinHash(ngram=1), Decontaminate([evaluations])]


def test_all_rules_one_after_another(tmp_path: Path) -> None:
    texts, rules = mixed(tmp_path)
    results = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        kept, ids, report = run(folder, texts, *rules, workers=workers, piece_bytes=1000, memory=100_000)
        results.append((kept, ids, report["documents"], report["bytes"], (folder / "out.jsonl").read_bytes()))
        dropped = {rule["rule"]: rule["documents"] for rule in report["rules"]}
        assert dropped == {"exact": 1, "lines": 0, "minhash": 1, "substrings": 0, "decontaminate": 1}
        assert sorted(set(range(60)) - set(ids)) == [10, 41, 50]
        kept_texts = dict(zip(ids, kept, strict=True))
        assert kept_texts[20] == texts[20] and kept_texts[21] == texts[21].rpartition("\n")[0]
        assert kept_texts[30] == texts[30] and len(kept_texts[31]) < 20
        assert sorted(os.listdir(folder)) == ["in.jsonl", "out.jsonl"]
    assert results[0] == results[1]


def test_lines_pass_through_byte_for_byte(tmp_path: Path) -> None:
    lines = [
        b'{"n": 1.50, "text" : "a\\u00fc", "big": 123456789012345678901234567890}\r',
        b'{"text": "\xc3\xbc", "n": NaN}',
        b"",
        b'{"text": "a\xc3\xbc"}',
        b'{"text": "last", "odd": "\\ud800"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    dedup_corpus([tmp_path / "x.jsonl"], tmp_path / "o.jsonl", [Exact()])
    assert (tmp_path / "o.jsonl").read_bytes() == b"".join(lines[n] + b"\n" for n in (0, 1, 4))


def test_changed_lines_keep_their_other_fields(tmp_path: Path) -> None:
    repeated = "this line stands twice, and that is once too often"
    first = json.dumps({"text": repeated})
    second = '{"a": 123456789012345678901234567890, "text": "x\\nTWICE", "odd": "\\ud800"}'
    second = second.replace("TWICE", repeated)
    (tmp_path / "x.jsonl").write_text(f"{first}\n{second}\n")
    dedup_corpus([tmp_path / "x.jsonl"], tmp_path / "o.jsonl", [Lines()])
    written = (tmp_path / "o.jsonl").read_text().splitlines()
    assert written[0] == first
    expected = {**json.loads(second), "text": "x"}
    assert json.loads(written[1]) == expected and list(json.loads(written[1])) == list(expected)


def test_formats_and_compression(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "in"
    folder.mkdir()
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "one"}\n\n{"text": "two", "n": 1}\n')
    parquet.write_table(pyarrow.table({"text": ["two", "three"], "n": [2, 3]}), folder / "b.parquet")
    (folder / "c.txt").write_text("three")
    (folder / "d.txt").write_text("four")
    report = dedup_corpus([folder], tmp_path / "out.jsonl.gz", [Exact()], workers=2)
    contents = [record.content for record in read_records([tmp_path / "out.jsonl.gz"])]
    assert contents == [{"text": "one"}, {"text": "two", "n": 1}, {"text": "three", "n": 3}, {"text": "four"}]
    pairs = [(row["dropped"], row["kept"]) for row in report["rules"][0]["examples"]]
    assert pairs == [
        (f"{folder}/b.parquet:1", f"{folder}/a.jsonl.gz:3"),
        (f"{folder}/c.txt:1", f"{folder}/b.parquet:2"),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_stop_or_are_skipped(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good", "good", "better"] * 5)
    path.write_text(path.read_text() + '{"text": 1}\n{"text": "best"}\n{"text": "cut')
    with pytest.raises(CorpusError, match=r'x\.jsonl:16: "text" is a int, not a text'):
        dedup_corpus([path], tmp_path / "o.jsonl", [Exact()], workers=workers, piece_bytes=50)
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl"]
    report = dedup_corpus(
        [path], tmp_path / "o.jsonl", [Exact()], workers=workers, piece_bytes=50, on_error="skip"
    )
    assert report["documents"] == {"read": 18, "kept": 3, "dropped": 13, "rejected": 2}
    assert "x.jsonl:16: " in caplog.text and "x.jsonl:18: not JSON" in caplog.text
    kept = [record.content["text"] for record in read_records([tmp_path / "o.jsonl"])]
    assert kept == ["good", "better", "best"]


def test_a_wrong_key_is_one_short_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good"] * 100)
    with pytest.raises(CorpusError, match='no key "body"') as error:
        dedup_corpus([path], tmp_path / "o.jsonl", [Exact()], text_key="body")
    assert len(str(error.value).splitlines()) == 11 and "and 90 more" in str(error.value)


def test_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    for number, rules in enumerate([[Exact()], [Substrings(), MinHash(verify=0.5), Lines()]]):
        report = dedup_corpus([tmp_path / "x.jsonl"], tmp_path / f"{number}.jsonl", rules)
        assert report["documents"]["read"] == 0 and (tmp_path / f"{number}.jsonl").read_bytes() == b""


def test_an_output_may_have_any_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a", "b", "a"])
    for name in ("verdict.bin", "sizes.bin", "output", "lock"):
        dedup_corpus([path], tmp_path / name, [Exact()])
        assert (tmp_path / name).read_bytes() == b"".join(path.read_bytes().splitlines(keepends=True)[:2])


def test_an_output_among_the_inputs_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(CorpusError, match="among the inputs"):
        dedup_corpus([tmp_path], path, [Exact()])
    assert path.read_text()


def test_an_output_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a"])
    (tmp_path / "folder").mkdir()
    for report in (tmp_path / "folder", path / "report.json"):
        with pytest.raises(CorpusError, match=f"--report {report}: cannot be written: "):
            dedup_corpus([path], tmp_path / "o.jsonl", [Exact()], report=report)
    with pytest.raises(CorpusError, match=r"--output .*x\.jsonl/o\.jsonl: cannot be written: "):
        dedup_corpus([path], path / "o.jsonl", [Exact()])
    assert sorted(os.listdir(tmp_path)) == ["folder", "x.jsonl"]


def test_no_rule_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a"])
    for rules, numbers in (([], {}), ([Exact()], {"workers": 0}), ([Exact()], {"memory": 0})):
        with pytest.raises(CorpusError):
            dedup_corpus([path], tmp_path / "o.jsonl", rules, **numbers)


def hold(output: Path, held: "multiprocessing.synchronize.Event") -> None:
    with workspace(output):
        held.set()
        time.sleep(60)


def test_two_runs_to_one_output_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a"])
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "o.jsonl", held))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(CorpusError, match="another run is writing it"):
            dedup_corpus([path], tmp_path / "o.jsonl", [Exact()])
    finally:
        other.kill()
        other.join()
    dedup_corpus([path], tmp_path / "o.jsonl", [Exact()])  # what the killed run left is no hindrance
    assert sorted(os.listdir(tmp_path)) == ["o.jsonl", "x.jsonl"]


def test_what_a_killed_run_left_is_cleared_first(tmp_path: Path) -> None:
    left = tmp_path / ".o.jsonl.dedup" / "run-1-2"
    left.mkdir(parents=True)
    (left / "texts").write_text("much")
    with workspace(tmp_path / "o.jsonl") as folder:
        assert folder.parent == left.parent and os.listdir(folder) == [] and not left.exists()
    assert os.listdir(tmp_path) == []


def test_a_killed_run_leaves_nothing_that_matters(tmp_path: Path) -> None:
    texts = [f"document {number % 3000} has some words of its own: {number % 41}" for number in range(6000)]
    path = write_lines(tmp_path / "x.jsonl", texts)
    rules = [Exact(), Lines(minimum=10), MinHash(ngram=2)]
    expected = tmp_path / "expected.jsonl"
    seconds = dedup_corpus([path], expected, rules, workers=1, piece_bytes=1 << 15)["seconds"]["total"]
    program = (
        "import sys\nfrom megatron_lite.corpus.dedup import *\n"
        "if __name__ == '__main__':\n    print('begin', flush=True)\n"
        f"    dedup_corpus([sys.argv[1]], sys.argv[2], {rules!r}, workers=2, piece_bytes=1 << 15)\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py", path, tmp_path / "o.jsonl"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    for part in (0.1, 0.6, 1.1):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begin\n"
            time.sleep(part * seconds)
            process.send_signal(signal.SIGKILL)
            try:  # the pipe ends when the workers have ended, too: they hold it open
                process.communicate(timeout=60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if (tmp_path / "o.jsonl").exists():
            assert (tmp_path / "o.jsonl").read_bytes() == expected.read_bytes()
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert (tmp_path / "o.jsonl").read_bytes() == expected.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected.jsonl", "o.jsonl", "program.py", "x.jsonl"]


class Grows(NamedTuple):
    """No rule: somebody else writes to an input."""

    path: Path

    def apply(self, corpus: object) -> dict[str, object]:
        self.path.write_bytes(self.path.read_bytes() + gzip.compress(b'{"text": "more"}\n'))
        return {}


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a line"}\n'))
    with pytest.raises(CorpusError, match="has changed while it was read"):
        dedup_corpus([path], tmp_path / "o.jsonl", [Exact(), Grows(path)])
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl.gz"]


def test_examples_are_few_and_the_report_is_the_same(tmp_path: Path) -> None:
    texts = ["x" * 1000] * 50
    reports = []
    for workers, memory in ((1, 1 << 20), (2, 3000)):
        run(tmp_path, texts, Exact(), workers=workers, memory=memory, report=tmp_path / "r.json")
        reports.append((tmp_path / "r.json").read_bytes())
    assert all(before == after for before, after in itertools.pairwise(reports))
    examples = json.loads(reports[0])["rules"][0]["examples"]
    assert [row["dropped"] for row in examples] == [f"{tmp_path}/in.jsonl:{line}" for line in range(2, 7)]
    assert {row["kept_text"] for row in examples} == {"x" * 200 + "…"}
