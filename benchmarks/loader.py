"""Reading samples and building the index of samples: ours, Megatron-core's, nanoGPT's get_batch, a plain copy.

    python benchmarks/loader.py [--rounds N] [--until SECONDS] [loader] [index]

`loader`: samples of --seq-length tokens a second from files that are in the page cache, on one thread where nothing
else is said. Sides take turns within one process, so that ratios are of the same minute. Ours, Megatron's dataset
and the plain copy read samples in a random order, nanoGPT from random places. What each makes of a sample differs:
ours and Megatron's make int64 inputs and labels and a float32 mask (Megatron's one sample at a time, positions too, no
batch), nanoGPT int64 inputs and labels, the plain copy nothing but the ids as they are stored.
`index`: --tokens tokens x 2 epochs from a table of document lengths, each turn in a process of its own: seconds, and
the most memory beyond the table, over the size of the result.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bare import ROOT

from megatron_lite.data import BlendedDataset, DataLoader, GPTDataset, IndexedDataset, IndexedDatasetWriter
from megatron_lite.data.blend import blend_index
from megatron_lite.data.sample_index import Tokens, epoch_order, megatron_order

BATCH, MICRO, EOD = 64, 8, 50256
Side = Callable[[int], None]  # reads about so many samples
MEGATRON = importlib.util.find_spec("megatron") is not None


def document_lengths(tokens: int, mean: int = 1000) -> np.ndarray:
    """Lengths as of real text, log-normal, that add up to about `tokens`."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(0.0, 1.2, tokens // mean)
    return np.maximum(drawn * (tokens / drawn.sum()), 1).astype(np.int32)


def write(prefix: Path, tokens: int, dtype: str) -> IndexedDataset:
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for length in document_lengths(tokens).tolist():
            writer.add_document(np.append(random.integers(0, EOD, length - 1), EOD).astype(dtype))
    return IndexedDataset(prefix)


def ours(dataset: Any, **settings: Any) -> Side:
    """Goes on from turn to turn, and begins again at the end."""
    loaders: list[DataLoader] = []

    def read(samples: int) -> None:
        for _ in range(samples // BATCH):
            if not loaders or not loaders[0].remaining_steps:
                loaders[:] = [DataLoader(dataset, MICRO, BATCH, eod_id=EOD, vocab_size=EOD + 1, **settings)]
            loaders[0].next_step()

    return read


def nanogpt(prefix: Path, dtype: str, seq_length: int) -> Side:
    """`get_batch` of train.py, which maps the file anew for every batch."""
    import torch

    def read(samples: int) -> None:
        for _ in range(samples // BATCH):
            data = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
            ix = torch.randint(len(data) - seq_length, (BATCH,))
            torch.stack([torch.from_numpy(data[i : i + seq_length].astype(np.int64)) for i in ix])
            torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_length].astype(np.int64)) for i in ix])

    return read


def plain_copy(indexed: IndexedDataset, seq_length: int) -> Side:
    out = np.empty((BATCH, seq_length + 1), indexed.dtype)
    places = np.random.default_rng(0).permutation(indexed.num_tokens // seq_length - 1) * seq_length
    taken = 0

    def read(samples: int) -> None:
        nonlocal taken
        for number in range(samples):
            begin = int(places[(taken + number) % len(places)])
            out[number % BATCH] = indexed.tokens[begin : begin + seq_length + 1]
        taken += samples

    return read


def megatron_dataset(prefix: Path, seq_length: int, samples: int) -> Any:
    """Megatron-core's GPTDataset over all of the files, in training order."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    class Tokenizer:
        unique_identifiers = {"class": "none"}  # noqa: RUF012
        pad, eod, vocab_size = EOD + 1, EOD, EOD + 2

    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        blend=([str(prefix)], None),
        split="1,0,0",
        **flags,
    )
    return BlendedMegatronDatasetBuilder(Theirs, [samples, 0, 0], lambda: True, config).build()[0]


def megatron(prefix: Path, seq_length: int, samples: int) -> Side:
    dataset = megatron_dataset(prefix, seq_length, samples)
    taken = 0

    def read(samples: int) -> None:
        nonlocal taken
        for number in range(samples):
            dataset[(taken + number) % len(dataset)]
        taken += samples

    return read


def loader(options: argparse.Namespace, folder: Path) -> None:
    for dtype in ("uint16", "int32"):
        prefix = folder / dtype
        indexed = write(prefix, options.file_tokens, dtype)
        whole, size, length = (
            range(len(indexed)),
            options.file_tokens // options.seq_length,
            options.seq_length,
        )
        dataset = GPTDataset(indexed, whole, size, length, 1)
        parts = np.array_split(np.arange(len(indexed)), 4)
        index = blend_index([0.4, 0.3, 0.2, 0.1], size)
        members = [GPTDataset(indexed, range(p[0], p[-1] + 1), size, length, 1) for p in parts]
        marks = dict.fromkeys(("eod_mask_loss", "reset_position_ids", "reset_attention_mask"), True)
        sides = {
            "ours": ours(dataset, num_workers=0),
            "ours, 1 thread ahead": ours(dataset, num_workers=1),
            "ours, 2 threads ahead": ours(dataset, num_workers=2),
            "ours, masks, positions, segments": ours(dataset, num_workers=0, **marks),
            "ours, blend of 4": ours(BlendedDataset(members, index), num_workers=0),
            "plain copy": plain_copy(indexed, length),
        }
        if importlib.util.find_spec("torch") is not None:
            sides["nanoGPT get_batch"] = nanogpt(prefix, dtype, length)
        if MEGATRON:
            sides["megatron-core GPTDataset"] = megatron(prefix, length, size)
        rates = turns(options, sides)
        print(f"\n### samples/s, {dtype} on disk, {options.file_tokens / 1e6:.0f}M tokens\n")
        table("samples/s", rates, "{:,.0f}")


def turns(options: argparse.Namespace, sides: dict[str, Side]) -> dict[str, list[float]]:
    """Samples a second of every side, one turn of each a round; a first round warms up and does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, read in sides.items():
            samples = options.samples // (1 if name.startswith(("ours", "plain")) else 8)
            begin = time.perf_counter()
            read(samples)
            if number:
                rates[name].append(samples // BATCH * BATCH / (time.perf_counter() - begin))
        if time.time() > options.until:
            break
    return rates


def table(title: str, figures: dict[str, list[float]], form: str) -> None:
    """Medians with their range, and ours over each other side, taken within each round."""
    print(f"| side | {title} | ours is so many times it |\n| --- | --- | --- |")
    first = next(iter(figures.values()))
    for name, own in figures.items():
        ratios = [ours / other for ours, other in zip(first, own, strict=True)]
        print(f"| {name} | {spread(own, form)} | {spread(ratios, '{:.2f}')} |")


def spread(values: list[float], form: str) -> str:
    shown = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} - {shown[2]})"


def megatrons_own(lengths: np.ndarray, seq_length: int, epochs: int = 2) -> dict[str, np.ndarray]:
    """What GPTDataset does to build its three arrays for some epochs, of which the last is not apart."""
    from megatron.core.datasets import gpt_dataset, helpers

    random = np.random.RandomState(1)
    documents = np.arange(len(lengths), dtype=np.int32)
    order = gpt_dataset._build_document_index(documents, epochs, random, False)
    total = int(lengths.sum(dtype=np.int64))
    starts = helpers.build_sample_idx(lengths, order, seq_length, epochs, total, True, True)
    count = len(starts) - 1
    return {
        "documents": order,
        "starts": starts,
        "shuffle": gpt_dataset._build_shuffle_index(count, count, random),
    }


def build_one(name: str, tokens: int, seq_length: int) -> None:
    """One turn of `index` in this process: prints seconds, bytes of the result, bytes at the most."""
    lengths = document_lengths(tokens)
    samples = 2 * int(lengths.sum(dtype=np.int64)) // seq_length - 1000
    source = Tokens(lengths, range(len(lengths)), 1)
    sides: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "ours": lambda: epoch_order(source, samples, seq_length),
        "ours, Megatron's order": lambda: megatron_order(source, samples, seq_length),
        "megatron-core": lambda: megatrons_own(lengths, seq_length),
    }
    if name == "megatron-core":
        megatrons_own(lengths[:100], 8)  # imports
    page, base, peak, done = os.sysconf("SC_PAGE_SIZE"), 0, 0, threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    base = peak = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    made = sides[name]()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    peak = max(peak, resident())
    print(seconds, sum(array.nbytes for array in made.values()), peak - base)


def index(options: argparse.Namespace) -> None:
    names = ["ours", "ours, Megatron's order", *(["megatron-core"] if MEGATRON else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--tokens", str(options.tokens)]
            command += ["--seq-length", str(options.seq_length)]
            environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            took, size, peak = map(float, done.stdout.split()[-3:])
            seconds[name].append(took)
            memory[name].append(peak / size)
        if time.time() > options.until:
            break
    print(f"\n### index of {options.tokens / 1e9:g}B tokens x 2 epochs\n")
    table("seconds", seconds, "{:.2f}")
    print()
    table("peak memory over the result", memory, "{:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help="loader, index; default both")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every side (%(default)s)")
    parser.add_argument("--seq-length", type=int, default=2048, metavar="S")
    parser.add_argument("--samples", type=int, default=32768, help="that ours reads a turn (%(default)s)")
    parser.add_argument("--file-tokens", type=int, default=100_000_000, help="loader (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10_000_000_000, help="index (%(default)s)")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds of the epoch to end at")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.one:
        build_one(options.one, options.tokens, options.seq_length)
        return 0
    processor = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    print(
        f"- {datetime.date.today()}, {processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at start"
    )
    print(f"- python {platform.python_version()}, numpy {np.__version__}; medians (least - most)")
    sections = options.sections or ["loader", "index"]
    if "loader" in sections:
        with tempfile.TemporaryDirectory() as folder:
            loader(options, Path(folder))
    if "index" in sections:
        index(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
