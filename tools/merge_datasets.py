"""Merge datasets (PREFIX.bin and .idx) into one, without encoding anything again; or split them by documents.

Inputs are taken in the order given, those of a folder or a glob sorted by name. Older files (TNTIDX, datatrove's .ds)
are converted to today's format on the way; for that alone, give one input.

Exit status: 0 done, 2 damaged data or bad settings (nothing is written then).
"""

from __future__ import annotations

import argparse
import logging
import sys
from fractions import Fraction

from megatron_lite.command import command
from megatron_lite.data.merge import merge_datasets


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IN", help="prefixes, FILE.ds, folders of such or globs"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--split",
        metavar="A,B,…",
        help="PREFIX_00000, PREFIX_00001, … with these shares of the documents, in order",
    )
    parts.add_argument(
        "--documents-per-part",
        type=int,
        metavar="N",
        help="the same, each with N documents, the last with the rest",
    )
    options = parser.parse_args(arguments)
    if options.documents_per_part is not None and options.documents_per_part < 1:
        parser.error("--documents-per-part is at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    merged = merge_datasets(
        options.input,
        options.output_prefix,
        shares=None if options.split is None else parse_shares(options.split),
        documents_per_part=options.documents_per_part,
    )
    for prefix, documents, sequences, tokens in merged:
        print(f"{prefix}: documents {documents:,}, sequences {sequences:,}, tokens {tokens:,}")
    return 0


def parse_shares(text: str) -> list[Fraction]:
    try:
        return [Fraction(share) for share in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'--split "{text}": not numbers with commas between them') from None


if __name__ == "__main__":
    sys.exit(main())
