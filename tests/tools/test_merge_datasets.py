"""tools/merge_datasets.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.data import IndexedDataset, IndexedDatasetWriter
from tools.merge_datasets import main

ROOT = Path(__file__).resolve().parents[2]


def write(prefix: Path, documents: int) -> None:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for number in range(documents):
            writer.add_document([number] * 3)


def test_it_merges_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a", 3)
    write(tmp_path / "in" / "b", 2)
    assert main(["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/out"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: documents 5, sequences 5, tokens 15\n"
    assert [ids[0] for ids in IndexedDataset(tmp_path / "out")] == [0, 1, 2, 0, 1]
    for parts in (["--split", "60,40"], ["--documents-per-part", "3"]):
        assert main(["--input", f"{tmp_path}/out", "--output-prefix", f"{tmp_path}/s", *parts]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert "s_00000: documents 3" in first and "s_00001: documents 2" in second


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--split", "a,b"], "not numbers"),
        (["--split", "1,0"], "above 0"),
        (["--split", "1/0"], "not numbers"),
        (["--split", "1,1,1,1"], "gets none"),
    ],
)
def test_bad_settings_are_one_message(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 2)
    assert main(["--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/s", *arguments]) == 2
    assert reason in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.bin",
        "a.idx",
    ]


def test_it_starts_without_torch() -> None:
    code = "import sys; import tools.merge_datasets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
