"""Small corpora for these tests."""

import json
from pathlib import Path
from typing import Any

from megatron_lite.corpus.dedup import dedup_corpus

# Pieces of a few lines and runs of a few keys, so that merging has something to merge.
SMALL = {"piece_bytes": 100, "memory": 2000}


def write_lines(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run(
    folder: Path, texts: list[str], *rules: Any, **settings: Any
) -> tuple[list[str], list[int], dict[str, Any]]:
    """(texts, ids, report) of what is kept."""
    output = folder / "out.jsonl"
    report = dedup_corpus([write_lines(folder / "in.jsonl", texts)], output, rules, **{**SMALL, **settings})
    kept = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    counts, size = report["documents"], report["bytes"]
    assert counts["read"] == len(texts) == counts["kept"] + counts["dropped"] + counts["rejected"]
    assert counts["kept"] == len(kept)
    assert (
        size["read"]
        == sum(len(text.encode()) for text in texts)
        == size["kept"] + size["dropped"] + size["cut"]
    )
    assert size["kept"] == sum(len(row["text"].encode()) for row in kept)
    return [row["text"] for row in kept], [row["id"] for row in kept], report
