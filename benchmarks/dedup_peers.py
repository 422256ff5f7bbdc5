"""One deduplication by a peer: what benchmarks/dedup.py starts with an interpreter that has it.

Usage: dedup_peers.py datatrove|text_dedup exact|minhash INPUT FOLDER WORKERS. Prints the documents kept, last.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

BANDS, ROWS, NGRAM = 14, 8, 5  # datatrove's defaults, and ours


def main() -> None:
    peer, kind, source, folder, workers = sys.argv[1:]
    place = Path(folder)
    kept = {"datatrove": datatrove, "text_dedup": text_dedup}[peer](kind, Path(source), place, int(workers))
    print(kept)


def datatrove(kind: str, source: Path, folder: Path, workers: int) -> int:
    """All stages of its example pipelines, as processes of this machine; a task reads one file, so that there is one
    file for each worker."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    inputs = folder / "inputs"
    inputs.mkdir()
    lines = source.read_bytes().splitlines(keepends=True)
    for number in range(workers):
        part = lines[len(lines) * number // workers : len(lines) * (number + 1) // workers]
        (inputs / f"{number}.jsonl").write_bytes(b"".join(part))
    print("ready", flush=True)

    def run(*steps: object, tasks: int = workers) -> None:
        LocalPipelineExecutor(
            list(steps),
            tasks=tasks,
            workers=min(workers, tasks),
            skip_completed=False,
            logging_dir=str(folder / "logs"),
        ).run()

    def reader() -> object:
        return JsonlReader(str(inputs))

    writer = JsonlWriter(str(folder / "kept"), compression=None)
    if kind == "exact":
        from datatrove.pipeline.dedup import ExactDedupFilter, ExactDedupSignature, ExactFindDedups
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

        config = ExactDedupConfig(content_getter=_text)
        run(reader(), ExactDedupSignature(str(folder / "signatures"), config, finder_workers=workers))
        run(ExactFindDedups(str(folder / "signatures"), str(folder / "duplicates"), config))
        run(reader(), ExactDedupFilter(str(folder / "duplicates"), config), writer)
    else:
        from datatrove.pipeline.dedup import (
            MinhashDedupBuckets,
            MinhashDedupCluster,
            MinhashDedupFilter,
            MinhashDedupSignature,
        )
        from datatrove.pipeline.dedup.minhash import MinhashConfig

        config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
        run(reader(), MinhashDedupSignature(str(folder / "signatures"), config=config))
        run(
            MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config),
            tasks=BANDS,
        )
        run(MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config), tasks=1)
        run(reader(), MinhashDedupFilter(str(folder / "remove")), writer)
    return sum(_lines(path) for path in (folder / "kept").iterdir())


def _text(document: object) -> str:
    return document.text  # type: ignore[attr-defined]


def _lines(path: Path) -> int:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        return sum(1 for _ in file)


def text_dedup(kind: str, source: Path, folder: Path, workers: int) -> int:
    """Its command line; the dataset is made of the file before (`ready`), which datasets keeps in a cache."""
    import datasets

    cache, output = folder / "cache", folder / "kept"
    environment = {**os.environ, "HF_HOME": str(cache), "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", f"text_dedup.{'exact_hash' if kind == 'exact' else 'minhash'}"]
    command += ["--path", "json", "--data_files", str(source), "--split", "train", "--cache_dir", str(cache)]
    command += [
        "--output",
        str(output),
        "--column",
        "text",
        "--batch_size",
        "10000",
        "--num_proc",
        str(workers),
    ]
    if kind == "exact":
        command += ["--hash_func", "xxh3"]
    else:
        command += [
            "--ngram",
            str(NGRAM),
            "--num_perm",
            str(BANDS * ROWS),
            "--b",
            str(BANDS),
            "--r",
            str(ROWS),
        ]
        command += ["--hash_func", "xxh3", "--hash_bits", "64"]
    print("ready", flush=True)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = len(datasets.load_from_disk(str(output)))
    shutil.rmtree(cache)
    return kept


if __name__ == "__main__":
    main()
