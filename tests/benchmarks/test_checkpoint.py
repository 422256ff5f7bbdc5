"""benchmarks/checkpoint.py runs to the end and fills its table; nothing is said of how fast."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_a_row_for_each_side(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/checkpoint.py"), "--quick", "--folder", str(tmp_path)]
    sides = ["ours", "ours async", "torch.save", "reshard"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--sides", *sides], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    ]
    assert [row[0] for row in rows[2:]] == sides[:3]
    assert re.search(r"- reshard: \d.* s, .* GB/s, peak 0\.\d\d GiB; .* %", done.stdout), done.stdout
    assert all(len(row) == len(rows[0]) for row in rows), rows
    assert [row[5] == "-" for row in rows[2:]] == [True, False, True], "who stalls"
    assert [row[7] == "-" for row in rows[2:]] == [True, False, True], "whose computing is measured"
    assert [row[8] == "-" for row in rows[2:]] == [False, True, False], "who loads"
    assert "- a step of the computing, alone: " in done.stdout
    assert list(tmp_path.iterdir()) == []
