"""One side of benchmarks/data.py in a process of its own, so that memory and start are its alone.

Usage: data_peers.py encode KIND INPUT OUTPUT TOKENIZER WORKERS
       data_peers.py loader KIND PREFIX SEQ_LENGTH SECONDS
       data_peers.py index KIND LENGTHS.npy SEQ_LENGTH EPOCHS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BATCH = 1000  # documents handed to a library at once
MICRO = 8  # samples of a batch


# --- encoding: JSON lines to ids in one file, by a library alone -----------------------------------------------------


def encode(kind: str, source: str, output: str, spec: str, workers: str) -> None:
    path = spec.partition(":")[2]
    with open(output, "wb") as file:
        for ids in ENCODERS[kind](source, path, int(workers)):
            file.write(ids)


def batches(source: str) -> Iterator[list[str]]:
    with open(source, "rb") as file:
        while lines := list(islice(file, BATCH)):
            yield [json.loads(line)["text"] for line in lines]


def by_tokenizers(source: str, path: str, workers: int) -> Iterator[Any]:
    """Hugging Face's library, on its own threads (RAYON_NUM_THREADS, set by the caller)."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    for texts in batches(source):
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        yield np.fromiter(chain.from_iterable(own.ids for own in found), dtype=np.int32)


def by_tiktoken(source: str, path: str, workers: int) -> Iterator[Any]:
    """OpenAI's library, on its own threads."""
    import numpy as np

    from megatron_lite.tokenizers import load_tokenizer

    encoding = load_tokenizer(f"tiktoken:{path}")._encoding  # type: ignore[attr-defined]
    for texts in batches(source):
        found = encoding.encode_ordinary_batch(texts, num_threads=workers)
        yield np.fromiter(chain.from_iterable(found), dtype=np.int32)


def by_gigatoken(source: str, path: str, workers: int) -> Iterator[Any]:
    """gigatoken's own reader of JSON lines, which holds the whole file and all its ids; special tokens in texts become
    ids."""
    import gigatoken
    import numpy as np

    load = gigatoken.Tokenizer.from_tiktoken if path.endswith(".tiktoken") else gigatoken.Tokenizer
    found = load(path).encode_files(gigatoken.JsonlFileSource([source], field="text"))
    yield np.asarray(found.layout.content.data)


ENCODERS: dict[str, Callable[[str, str, int], Iterator[Any]]] = {
    "tokenizers": by_tokenizers,
    "tiktoken": by_tiktoken,
    "gigatoken": by_gigatoken,
}


# --- loading: samples of S tokens and their labels, out of the page cache -------------------------------------------


def loader(kind: str, prefix: str, seq_length: str, seconds: str) -> None:
    read = LOADERS[kind](prefix, int(seq_length))
    read()  # files mapped, memory there
    rates = []
    for _ in range(5):
        count, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < float(seconds) / 5:
            count += read()
        rates.append(count / spent)
    print(json.dumps({"rates": rates}))


def ours(prefix: str, seq_length: int) -> Callable[[], int]:
    """The loader, read ahead by one thread, as in training."""
    from megatron_lite.config import DataConfig
    from megatron_lite.data import DataLoader, build_dataset

    dataset = build_dataset(DataConfig(train=prefix, split="1"), "train", seq_length, 1, 10_000_000)
    assert dataset is not None
    made = DataLoader(dataset, MICRO, MICRO * 8)
    return lambda: sum(len(batch.tokens) for batch in made.next_step())


def get_batch(prefix: str, seq_length: int) -> Callable[[], int]:
    """nanoGPT's get_batch: random places of a map, one row after the other."""
    import numpy as np
    import torch

    def read() -> int:
        data = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - seq_length, (MICRO,))
        torch.stack([torch.from_numpy((data[i : i + seq_length]).astype(np.int64)) for i in places])
        torch.stack([torch.from_numpy((data[i + 1 : i + 1 + seq_length]).astype(np.int64)) for i in places])
        return MICRO

    return read


def megatron(prefix: str, seq_length: int) -> Callable[[], int]:
    """Megatron-core's GPTDataset in training order, collated as torch's DataLoader does, in this process."""
    import torch
    from loader import megatron_dataset

    dataset = megatron_dataset(Path(prefix), seq_length, 100_000)
    place = 0

    def read() -> int:
        nonlocal place
        samples = [dataset[(place + number) % len(dataset)] for number in range(MICRO)]
        place += MICRO
        torch.utils.data.default_collate(samples)
        return MICRO

    return read


LOADERS = {"megatron_lite": ours, "megatron-core": megatron, "nanoGPT get_batch": get_batch}


# --- index: which tokens every sample of some epochs holds -----------------------------------------------------------


def index(kind: str, lengths: str, seq_length: str, epochs: str) -> None:
    import numpy as np

    sizes = np.load(lengths)
    make = INDICES[kind]
    make(sizes[:1000], int(seq_length), int(epochs))  # modules loaded
    before = _memory()
    begun = time.perf_counter()
    size = make(sizes, int(seq_length), int(epochs))
    print(json.dumps({"seconds": time.perf_counter() - begun, "result": size, "peak": _memory() - before}))


def our_index(sizes: Any, seq_length: int, epochs: int) -> int:
    from megatron_lite.data.sample_index import Tokens, epoch_order

    samples = epochs * ((int(sizes.sum(dtype="int64")) - 1) // seq_length)
    order = epoch_order(Tokens(sizes, range(len(sizes)), 1), samples, seq_length)
    return sum(array.nbytes for array in order.values())


def megatron_index(sizes: Any, seq_length: int, epochs: int) -> int:
    """GPTDataset's three arrays, with its own functions."""
    from loader import megatrons_own

    return sum(array.nbytes for array in megatrons_own(sizes, seq_length, epochs).values())


INDICES = {"megatron_lite": our_index, "megatron-core": megatron_index}


def _memory() -> int:
    """The most bytes this process has held (getrusage's begin with those of the process that started it)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


if __name__ == "__main__":
    {"encode": encode, "loader": loader, "index": index}[sys.argv[1]](*sys.argv[2:])
