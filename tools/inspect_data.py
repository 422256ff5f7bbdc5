"""Say what a PREFIX.bin/.idx pair holds, and show or dump the samples that training on it would see.

Exit status: 0 done, 2 damaged data or bad settings.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from megatron_lite.config import DataConfig
from megatron_lite.data import IndexedDataset, SampleDataset, build_datasets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="path without .bin and .idx")
    parser.add_argument(
        "--seq-length", type=int, metavar="S", help="show training samples of this many tokens"
    )
    parser.add_argument(
        "--split", default="969,30,1", help="shares of training, validation, test (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--num-samples", type=int, metavar="N", help="samples asked of the training split")
    parser.add_argument("--order", choices=("epoch", "megatron"), default="epoch")
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder for the index (index_cache beside the data)"
    )
    parser.add_argument("--dump", metavar="FILE.npz", help="write them: tokens [N, S + 1], in training order")
    options = parser.parse_args(arguments)
    if (options.dump or options.num_samples is not None) and options.seq_length is None:
        parser.error("samples need --seq-length")
    if any(value is not None and value < 1 for value in (options.seq_length, options.num_samples)):
        parser.error("--seq-length and --num-samples are at least 1")
    try:
        summarize(IndexedDataset(options.prefix))
        if options.seq_length is not None:
            config = DataConfig(
                train=options.prefix, split=options.split, order=options.order, cache_dir=options.cache_dir
            )
            train, _, _ = build_datasets(config, options.seq_length, options.seed, options.num_samples)
            show_samples(train, options.num_samples, options.dump)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def summarize(indexed: IndexedDataset) -> None:
    lengths = indexed.lengths
    print(f"{indexed.prefix}: verified (index, offsets, document bounds, sizes of both files)")
    print(f"documents {indexed.num_documents:,}, sequences {len(indexed):,}, tokens {indexed.num_tokens:,}")
    print(f"dtype {indexed.dtype.name}")
    if len(indexed):
        print(f"tokens per sequence: {lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.1f}")
    if indexed.num_tokens:
        print(f"ids: {indexed.tokens.min():,} to {indexed.tokens.max():,}")


def show_samples(train: SampleDataset, asked: int | None, dump: str | None) -> None:
    count = len(train) if asked is None else min(asked, len(train))
    print(f"training samples: {len(train):,}")
    for sample in range(min(count, 3)):
        print(f"  {sample}: {' '.join(map(str, train[sample][:16]))} …")
    if dump:
        np.savez(dump, tokens=train.batch(range(count)))
        print(f"{dump}: tokens [{count:,}, S + 1]")


if __name__ == "__main__":
    sys.exit(main())
