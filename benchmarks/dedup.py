"""Deduplication, ours and datatrove's and text-dedup's: MB/s of text files, memory, documents kept.

Sides take turns, each in processes of its own with as many workers; ratios are taken within a round. Time runs from
the start of the program (ours), or from where its inputs lie as it wants them (peers), to the end of the last file;
memory is the most that all processes of a side held together (PSS), looked at ten times a second. MinHash is over
runs of 5 words with 14 bands of 8 rows on all sides, though each has its own idea of a word. `disk` reads the file
around the page cache and does nothing with it. Peers are looked for in the interpreter that --peers names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("datatrove", "text_dedup")
KINDS = ("exact", "minhash")
OURS, DISK = "megatron_lite", "disk"


class Turn(NamedTuple):
    seconds: float
    peak: int  # bytes
    kept: int  # documents


def ours(kind: str, source: Path, folder: Path, workers: int) -> Turn:
    output = folder / "kept.jsonl"
    tool = [
        sys.executable,
        str(ROOT / "tools/dedup_corpus.py"),
        "--input",
        str(source),
        "--output",
        str(output),
    ]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*tool, f"--{kind}", "--workers", str(workers)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    peak = watch(process)
    seconds = time.perf_counter() - begun
    report = json.loads(Path(f"{output}.report.json").read_text())
    return Turn(seconds, peak, report["documents"]["kept"])


def peer(name: str, python: str, kind: str, source: Path, folder: Path, workers: int) -> Turn:
    script = Path(__file__).with_name("dedup_peers.py")
    process = subprocess.Popen(
        [python, str(script), name, kind, str(source), str(folder), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            break
    begun = time.perf_counter()
    peak = watch(process)
    seconds = time.perf_counter() - begun
    return Turn(seconds, peak, int(process.stdout.read().splitlines()[-1]))


def watch(process: subprocess.Popen[str]) -> int:
    """Waits for the end; the most bytes that the processes of its session held together."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, session_memory(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with status {process.returncode}")
    return peak


def session_memory(session: int) -> int:
    """PSS in bytes; 0 where the system does not tell."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.getsid(int(entry.name)) == session:
                rollup = (entry / "smaps_rollup").read_text()
                total += int(rollup.partition("\nPss:")[2].split()[0]) << 10
    return total


def disk(source: Path) -> float:
    """Seconds to read the file from the disk."""
    buffer = mmap.mmap(-1, 4 << 20)
    try:
        file = os.open(source, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system without direct reads
        file = os.open(source, os.O_RDONLY)
    begun = time.perf_counter()
    while os.readv(file, [buffer]):
        pass
    seconds = time.perf_counter() - begun
    os.close(file)
    return seconds


def has(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def measure(
    source: Path, peers: str | None, workers: int, rounds: int, kinds: Sequence[str] = KINDS
) -> dict[str, dict[str, list[Turn]]]:
    """{kind: {side: turns}}. peers: an interpreter that has some of them, or None."""
    found = [name for name in PEERS if peers is not None and has(peers, name)]
    sides: dict[str, Callable[[str, Path], Turn]] = {
        OURS: lambda kind, folder: ours(kind, source, folder, workers)
    }
    for name in found:
        sides[name] = lambda kind, folder, name=name: peer(name, str(peers), kind, source, folder, workers)  # type: ignore[misc]
    turns: dict[str, dict[str, list[Turn]]] = {kind: {side: [] for side in (*sides, DISK)} for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            turns[kind][DISK].append(Turn(disk(source), 0, 0))
            for name, side in sides.items():
                folder = Path(tempfile.mkdtemp(dir=source.parent))
                try:
                    turns[kind][name].append(side(kind, folder))
                finally:
                    shutil.rmtree(folder)
                print(f"{kind} {name}: {turns[kind][name][-1].seconds:.1f} s", file=sys.stderr)
    return turns


def table(turns: dict[str, dict[str, list[Turn]]], size: int) -> str:
    """Markdown. size: bytes of the file."""
    rows = [
        "| rule | side | MB/s | megatron_lite / side | peak MiB | documents kept |",
        "|---|---|---|---|---|---|",
    ]
    for kind, sides in turns.items():
        for name, own in sides.items():
            rate = spread([size / 1e6 / turn.seconds for turn in own], 1)
            pairs = zip(own, sides[OURS], strict=True)
            ratio = spread([theirs.seconds / mine.seconds for theirs, mine in pairs], 2)
            peak, kept = max(turn.peak for turn in own) / 2**20, own[0].kept
            memory = f"{peak:.0f} | {kept:,}" if name != DISK else " | "
            rows.append(f"| {kind} | {name} | {rate} | {ratio} | {memory} |")
    return "\n".join(rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} - {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help='JSON lines with a "text"')
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter with datatrove and text-dedup")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    turns = measure(options.input.absolute(), options.peers, options.workers, options.rounds, options.kinds)
    size = options.input.stat().st_size
    print(
        f"- machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.workers} workers"
    )
    print(f"- input: {size / 1e6:.0f} MB; {options.rounds} rounds, medians, (least - most)\n")
    print(table(turns, size))


if __name__ == "__main__":
    main()
