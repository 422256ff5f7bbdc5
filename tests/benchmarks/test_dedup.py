"""benchmarks/dedup.py runs to the end without peers and fills its table; nothing is said of how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_our_rows(tmp_path: Path) -> None:
    texts = [f"document {number % 30} of some words that are its own: {number % 30}" for number in range(40)]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(ROOT / "benchmarks/dedup.py"), "--input", str(source), "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--workers", "1"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    ]
    assert [row[:2] for row in rows[2:]] == [
        *(["exact", "megatron_lite"], ["exact", "disk"], ["minhash", "megatron_lite"], ["minhash", "disk"])
    ]
    assert rows[2][-1] == "30" and rows[2][3] == "1.00 (1.00 - 1.00)"
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl"]
