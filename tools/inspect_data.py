"""Say what a PREFIX.bin/.idx pair holds and whether it is intact, and show its documents and the samples that training
on it would see, in training order.

Always checked: index, offsets, document bounds, sizes of both files, what PREFIX.json says of them, and that all ids
are in the vocabulary, where --tokenizer or PREFIX.json tell its size.

Exit status: 0 done, 2 damaged data or bad settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from megatron_lite.command import command
from megatron_lite.config import DataConfig
from megatron_lite.data import IndexedDataset, SampleDataset, Sidecar, build_datasets
from megatron_lite.data.audit import audit, describe
from megatron_lite.data.statistics import (
    Bin,
    check_ids,
    check_sidecar,
    document_lengths,
    draw,
    histogram,
    ids_in_use,
)
from megatron_lite.tokenizers import Tokenizer, TokenizerError, load_tokenizer

SHARES = (1, 5, 25, 50, 75, 95, 99)
FREQUENT = 10
SHOWN_IDS = 16
SHOWN_CHARACTERS = 200


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (options.dump or options.num_samples is not None) and options.seq_length is None:
        parser.error("samples need --seq-length")
    if any(value is not None and value < 1 for value in (options.seq_length, options.num_samples)):
        parser.error("--seq-length and --num-samples are at least 1")
    inspect(options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="path without .bin and .idx")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="show text beside ids (needed where PREFIX.json names none)"
    )
    parser.add_argument("--documents", metavar="I,J,…", help="show these documents whole, numbered from 0")
    parser.add_argument(
        "--histogram", metavar="FILE.png", help="draw the lengths of documents into a picture too"
    )
    parser.add_argument(
        "--full", action="store_true", help="compare the checksums in PREFIX.json (reads both files)"
    )
    parser.add_argument("--quick", action="store_true", help="leave the ids unread")
    parser.add_argument(
        "--consumed",
        metavar="DIR",
        help="what the run of this checkpoint has consumed (see tools/audit_data.py)",
    )
    samples = parser.add_argument_group("samples in training order")
    samples.add_argument(
        "--seq-length", type=int, metavar="S", help="show training samples of this many tokens"
    )
    samples.add_argument(
        "--split", default="969,30,1", help="shares of training, validation, test (%(default)s)"
    )
    samples.add_argument("--seed", type=int, default=1234)
    samples.add_argument("--num-samples", type=int, metavar="N", help="samples asked of the training split")
    samples.add_argument("--order", choices=("epoch", "megatron"), default="epoch")
    samples.add_argument(
        "--cache-dir", metavar="DIR", help="folder for the index (index_cache beside the data)"
    )
    samples.add_argument("--show", type=int, metavar="N", default=3, help="how many are shown (%(default)s)")
    samples.add_argument(
        "--dump", metavar="FILE.npz", help="write them: tokens [N, S + 1], in training order"
    )
    return parser


def inspect(options: argparse.Namespace) -> None:
    indexed = IndexedDataset(options.prefix)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    sidecar = check_sidecar(options.prefix, options.full, tokenizer.fingerprint() if tokenizer else None)
    if tokenizer is None and (options.documents or (options.seq_length and sidecar)):
        try:
            tokenizer = tokenizer_of(sidecar, options.prefix)
        except ValueError as error:
            if options.documents:
                raise
            print(f"samples are shown as ids alone: {error}")
    summarize(indexed, sidecar, options.full)
    show_lengths(indexed, options.histogram)
    if not options.quick:
        show_ids(indexed, sidecar, tokenizer)
    if options.consumed:
        step, sources = audit(options.consumed)
        own = [describe(source) for source in sources if source.prefix == options.prefix]
        print("\n".join([f"consumed at step {step}:", *(own or ["  nothing: it is not in this run"])]))
    if options.documents and tokenizer is not None:
        show_documents(indexed, parse_numbers(options.documents), tokenizer)
    if options.seq_length is not None:
        config = DataConfig(
            train=options.prefix, split=options.split, order=options.order, cache_dir=options.cache_dir
        )
        train, _, _ = build_datasets(config, options.seq_length, options.seed, options.num_samples)
        show_samples(train, options.num_samples, options.show, tokenizer, options.dump)


def tokenizer_of(sidecar: Sidecar | None, prefix: str) -> Tokenizer:
    if sidecar is None:
        raise TokenizerError(f"{prefix}.json: not there to name the tokenizer; give it as --tokenizer SPEC")
    try:
        tokenizer = load_tokenizer(sidecar.tokenizer)
    except TokenizerError as error:
        raise TokenizerError(
            f"{error} (as {prefix}.json names it; say where it is with --tokenizer SPEC)"
        ) from None
    check_sidecar(prefix, False, tokenizer.fingerprint())
    return tokenizer


def summarize(indexed: IndexedDataset, sidecar: Sidecar | None, full: bool) -> None:
    lengths = indexed.lengths
    print(f"{indexed.prefix}: verified (index, offsets, document bounds, sizes of both files)")
    print(f"documents {indexed.num_documents:,}, sequences {len(indexed):,}, tokens {indexed.num_tokens:,}")
    print(f"dtype {indexed.dtype.name}")
    if sidecar is None:
        print("no PREFIX.json beside it: tokenizer and checksums are not known")
    else:
        eod = "appended to every document" if sidecar.append_eod else "not appended"
        print(f"tokenizer {sidecar.tokenizer}, vocabulary {sidecar.vocab_size:,}, eod {sidecar.eod_id} {eod}")
        if full:
            print(f"checksums verified: .bin {sidecar.checksums.bin}, .idx {sidecar.checksums.idx}")
    if len(indexed):
        print(f"tokens per sequence: {lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.1f}")


def show_lengths(indexed: IndexedDataset, picture: str | None) -> None:
    lengths = document_lengths(indexed)
    if lengths.documents:
        percentiles = zip(SHARES, lengths.percentiles(SHARES), strict=True)
        print(
            "tokens per document, percentiles: "
            + ", ".join(f"{share} %: {value:,}" for share, value in percentiles)
        )
    bins = histogram(lengths)
    for line in draw(bins):
        print(f"  {line}")
    if picture:
        save_histogram(bins, indexed.prefix, picture)
        print(f"{picture}: the same as a picture")


def save_histogram(bins: Sequence[Bin], title: str, path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"{path}: a picture needs the package matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar([f"{one.low:,}–{one.high:,}" for one in bins], [one.documents for one in bins], width=0.95)
    axes.tick_params(axis="x", rotation=60)
    axes.set(title=title, xlabel="tokens per document", ylabel="documents")
    figure.savefig(path)


def show_ids(indexed: IndexedDataset, sidecar: Sidecar | None, tokenizer: Tokenizer | None) -> None:
    ids = ids_in_use(indexed, FREQUENT)
    vocab_size = sidecar.vocab_size if sidecar else tokenizer.vocab_size if tokenizer else None
    check_ids(indexed, ids, vocab_size)
    if ids is None:
        return
    known = f", all in the vocabulary of {vocab_size:,}" if vocab_size else ""
    print(f"ids: {ids.lowest:,} to {ids.highest:,}{known}")
    if ids.frequent:
        shown = [
            f"{number} {quoted(tokenizer, [number])}{count / indexed.num_tokens:.2%}"
            for number, count in ids.frequent
        ]
        print(f"most frequent ids: {', '.join(shown)}")


def show_documents(indexed: IndexedDataset, numbers: list[int], tokenizer: Tokenizer) -> None:
    for number in numbers:
        if not 0 <= number < indexed.num_documents:
            raise ValueError(f"--documents: no document {number} among {indexed.num_documents:,} (from 0)")
        first, last = map(int, indexed.document_bounds[number : number + 2])
        ids = [token for sequence in range(first, last) for token in indexed.get(sequence).tolist()]
        print(f"--- document {number}: {len(ids):,} tokens in {last - first} sequences")
        print(tokenizer.decode(ids))


def show_samples(
    train: SampleDataset, asked: int | None, shown: int, tokenizer: Tokenizer | None, dump: str | None
) -> None:
    count = len(train) if asked is None else min(asked, len(train))
    print(f"training samples: {len(train):,}")
    for sample in range(min(count, shown)):
        ids = train[sample].tolist()
        print(f"  {sample}: {' '.join(map(str, ids[:SHOWN_IDS]))} …")
        if tokenizer is not None:
            print(f"     {quoted(tokenizer, ids)}")
    if dump:
        np.savez(dump, tokens=train.batch(range(count)))
        print(f"{dump}: tokens [{count:,}, S + 1]")


def quoted(tokenizer: Tokenizer | None, ids: list[int]) -> str:
    """The beginning of the ids' text in quotes, on one line; nothing where there is no tokenizer."""
    if tokenizer is None:
        return ""
    text = tokenizer.decode(ids)
    more = " …" if len(text) > SHOWN_CHARACTERS else ""
    return json.dumps(text[:SHOWN_CHARACTERS], ensure_ascii=False) + more + " "


def parse_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f'--documents "{text}": not numbers with commas between them') from None


if __name__ == "__main__":
    sys.exit(main())
