"""From text to batches: encoding, loading, indexing and deduplicating, ours and the peers' that are installed.

Sides take turns, each in processes of its own; ratios are taken within a round, medians (least - most) of the rounds.

encode  MB/s of JSON lines from the start of the program to the end of the last file; how much of that passes before the
        first ids are written; the most memory that all its processes held together (PSS)
loader  samples of S tokens and labels a second, out of the page cache
index   seconds for the order of all samples of some epochs, and the memory for it
dedup   as benchmarks/dedup.py

The corpus is text of this machine (sources and documentation of Python and its packages), or --text; none of it comes
twice. The vocabulary is --tokenizer, or is learned from the corpus.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bare import ROOT
from dedup import measure, session_memory, spread
from dedup import table as dedup_table

SECTIONS = ("encode", "loader", "index", "dedup")
OURS = "megatron_lite"
_PEERS = Path(__file__).with_name("data_peers.py")
_ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".json", ".c", ".h", ".hpp", ".cpp", ".jsonl")
_LARGEST = 4_000_000  # bytes of a file that is taken
_PAUSE = 0.02  # seconds between looks at a process


class Turn(NamedTuple):
    seconds: float
    first: float  # seconds to the first output
    peak: int  # bytes


# --- the corpus ------------------------------------------------------------------------------------------------------


def make_corpus(path: Path, size: int, texts: Sequence[str]) -> int:
    """Writes JSON lines of about `size` bytes in an order drawn once for ever; returns the bytes there are."""
    folders = texts or [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")]
    files = sorted({file for folder in folders for file in _files(Path(folder))})
    random.Random(1).shuffle(files)
    with open(path, "w", encoding="utf-8") as out:
        for file in files:
            if out.tell() >= size:
                break
            with suppress(OSError, UnicodeDecodeError):
                for text in _texts(file):
                    line = {"text": text, "source": file.name}
                    out.write(json.dumps(line, ensure_ascii=len(text) % 4 == 0) + "\n")
    return path.stat().st_size


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for folder, _, names in os.walk(place):
        for name in names:
            file = Path(folder, name)
            if name.endswith(_ENDINGS) and not file.is_symlink() and 200 < file.stat().st_size < _LARGEST:
                yield file


def _texts(file: Path) -> Iterator[str]:
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    else:
        yield file.read_text(encoding="utf-8")


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_sides(spec: str, source: Path, folder: Path, workers: int) -> dict[str, tuple[list[str], Path]]:
    """Command and the file its ids go to, of every side that is installed and knows the vocabulary."""
    common = ["--input", str(source), "--tokenizer", spec, "--append-eod", "--workers", str(workers)]
    tool = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *common]
    prefix = str(folder / "out")
    sides = {OURS: ([*tool, "--output-prefix", prefix], Path(f"{prefix}_text_document.bin.partial"))}
    reference = str(folder / "reference")
    sides[f"{OURS}, --encoder reference"] = (
        [*tool, "--output-prefix", reference, "--encoder", "reference"],
        Path(f"{reference}_text_document.bin.partial"),
    )
    kinds = {"hf": ("tokenizers", "gigatoken"), "tiktoken": ("tiktoken", "gigatoken")}
    for name in kinds.get(spec.partition(":")[0], ()):
        if importlib.util.find_spec(name):
            out = folder / f"{name}.bin"
            command = [sys.executable, str(_PEERS), "encode", name, str(source), str(out), spec, str(workers)]
            sides[f"{name} {importlib.metadata.version(name)} alone"] = (command, out)
    return sides


def run(command: list[str], first: Path, workers: int) -> Turn:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": str(workers)}
    first.unlink(missing_ok=True)
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    at_first, peak, looked = float("nan"), 0, 0.0
    while process.poll() is None:
        now = time.perf_counter() - begun
        if at_first != at_first and first.exists() and first.stat().st_size:
            at_first = now
        if now - looked > 0.1:
            peak, looked = max(peak, session_memory(process.pid)), now
        time.sleep(_PAUSE)
    seconds = time.perf_counter() - begun
    if process.returncode:
        sys.exit(f"{command} ended with status {process.returncode}")
    return Turn(seconds, at_first if at_first == at_first else seconds, peak)


def encode(source: Path, spec: str, folder: Path, workers: int, rounds: int) -> str:
    size = source.stat().st_size
    sides = encode_sides(spec, source, folder, workers)
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (command, first) in sides.items():
            turns[name].append(run(command, first, workers))
    rows = [
        "| side | MB/s | megatron_lite / side | seconds to the first ids | peak MB (PSS) |",
        "|---|---|---|---|---|",
    ]
    for name, own in turns.items():
        ratios = [theirs.seconds / mine.seconds for theirs, mine in zip(own, turns[OURS], strict=True)]
        rate = spread([size / 1e6 / turn.seconds for turn in own], 1)
        start = spread([turn.first for turn in own], 2)
        rows.append(
            f"| {name} | {rate} | {spread(ratios, 2)} | {start} | {max(t.peak for t in own) / 1e6:.0f} |"
        )
    return "\n".join([f"encode, {size / 1e6:.0f} MB, {workers} workers:", "", *rows])


# --- loading and indexing --------------------------------------------------------------------------------------------


def loader(folder: Path, tokens: int, seq_length: int, seconds: float, rounds: int) -> str:
    import numpy as np

    from megatron_lite.data import IndexedDatasetWriter

    draw = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "ids", np.uint16) as writer:
        while writer.state.tokens < tokens:
            length = int(draw.integers(50, 3000))
            writer.add_document(draw.integers(0, 50000, length, dtype=np.uint16))
    found = sides_of("loader", [str(folder / "ids"), str(seq_length), str(seconds)], rounds)
    rates = {name: [rate for turn in turns for rate in turn["rates"]] for name, turns in found.items()}
    rows = [
        "| side | samples/s |",
        "|---|---|",
        *(f"| {name} | {spread(own, 0)} |" for name, own in rates.items()),
    ]
    return "\n".join([f"loader, S = {seq_length}, {tokens / 1e6:.0f}M tokens in the page cache:", "", *rows])


def index(folder: Path, tokens: int, seq_length: int, epochs: int, rounds: int) -> str:
    import numpy as np

    # Lengths as texts have them: many short, some very long.
    draw = np.random.default_rng(1)
    sizes = np.minimum(draw.lognormal(6.3, 1.1, max(int(tokens / 900), 2000)), 1 << 20).astype(np.int32) + 1
    np.save(folder / "lengths.npy", sizes)
    found = sides_of("index", [str(folder / "lengths.npy"), str(seq_length), str(epochs)], rounds)
    rows = ["| side | seconds | result MB | peak / result |", "|---|---|---|---|"]
    for name, turns in found.items():
        result = turns[0]["result"]
        ratio = max(turn["peak"] for turn in turns) / result
        rows.append(
            f"| {name} | {spread([t['seconds'] for t in turns], 2)} | {result / 1e6:.0f} | {ratio:.2f} |"
        )
    total = int(sizes.sum(dtype=np.int64))
    head = f"index, {total / 1e9:.2f}B tokens in {len(sizes):,} documents, {epochs} epochs, S = {seq_length}:"
    return "\n".join([head, "", *rows])


def sides_of(section: str, arguments: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    kinds = [OURS]
    if importlib.util.find_spec("megatron"):
        kinds.append("megatron-core")
    if section == "loader" and importlib.util.find_spec("torch"):
        kinds.append("nanoGPT get_batch")
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            command = [sys.executable, str(_PEERS), section, kind, *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{section} of {kind}: {done.stderr}")
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return found


# --- all -------------------------------------------------------------------------------------------------------------


def header(options: argparse.Namespace) -> str:
    versions = [f"python {platform.python_version()}"]
    for name in (
        "numpy",
        "orjson",
        "gigatoken",
        "tokenizers",
        "tiktoken",
        "megatron-core",
        "datatrove",
        "torch",
    ):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return "\n".join(
        (
            f"- machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores{load}",
            f"- versions: {', '.join(versions)}",
            f"- turns: {options.rounds}; medians, (least - most)",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="PATH", help="files and folders of text, .jsonl too"
    )
    parser.add_argument("--megabytes", nargs="+", type=float, default=[64], help="of the corpora (64)")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="tiktoken:FILE, hf:FILE, …; default: a BPE of the corpus"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--seq-length", type=int, default=2048, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=5, help="of a loader's turn (%(default)s)")
    parser.add_argument("--loader-tokens", type=float, default=1e8, help="%(default)g")
    parser.add_argument("--index-tokens", type=float, default=1e10, help="%(default)g")
    parser.add_argument("--epochs", type=int, default=2, help="of the index (%(default)s)")
    parser.add_argument(
        "--peers", metavar="PYTHON", help="for dedup: an interpreter with datatrove and text-dedup"
    )
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    wanted = options.sections or SECTIONS
    print(header(options))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for megabytes in options.megabytes if {"encode", "dedup"} & set(wanted) else ():
            corpus(folder, int(megabytes * 1e6), wanted, options)
        if "loader" in wanted:
            tokens = int(options.loader_tokens)
            print(f"\n{loader(folder, tokens, options.seq_length, options.seconds, options.rounds)}")
        if "index" in wanted:
            tokens = int(options.index_tokens)
            print(f"\n{index(folder, tokens, options.seq_length, options.epochs, options.rounds)}")


def corpus(folder: Path, size: int, wanted: Sequence[str], options: argparse.Namespace) -> None:
    """The sections that read text."""
    from megatron_lite.tokenizers.train import train_bpe

    source = folder / "corpus.jsonl"
    found = make_corpus(source, size, options.text)
    if found < 0.9 * size:
        print(f"- of {size / 1e6:.0f} MB of text only {found / 1e6:.0f} are here; --text names more")
    if "encode" in wanted:
        spec = options.tokenizer
        if spec is None:
            with open(source, encoding="utf-8") as lines:
                sample = (json.loads(line)["text"] for _, line in zip(range(2000), lines, strict=False))
                train_bpe(sample, 32_000, folder / "tokenizer.json")
            spec = f"hf:{folder}/tokenizer.json"
        print(f"\n{encode(source, spec, folder, options.workers, options.rounds)}")
    if "dedup" in wanted:
        turns = measure(source, options.peers, options.workers, options.rounds)
        print(f"\ndedup, {found / 1e6:.0f} MB:\n\n{dedup_table(turns, found)}")


if __name__ == "__main__":
    main()
