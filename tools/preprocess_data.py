"""Tokenize text files to OUTPUT_PREFIX_KEY_document.{bin,idx}, byte for byte what Megatron-core writes.

Exit status: 0 done, 2 bad input or settings (nothing is written then).
"""

from __future__ import annotations

import argparse
import logging
import sys

from megatron_lite.corpus import EncodeStats, encode_corpus


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON lines or .txt, also .gz"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--tokenizer", required=True, metavar="SPEC", help="byte, hf:FILE, gpt2:FOLDER, tiktoken:FILE …"
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to write, one pair each"
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the tokenizer's eod"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that encode")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a line without a usable document"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers is at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        stats = encode_corpus(
            options.input,
            options.output_prefix,
            options.tokenizer,
            keys=options.json_keys,
            append_eod=options.append_eod,
            workers=options.workers,
            on_error=options.on_error,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(stats, options.output_prefix)
    return 0


def report(stats: EncodeStats, prefix: str) -> None:
    for key, counts in stats.keys.items():
        print(
            f"{prefix}_{key}_document: documents read {stats.read:,} = written {counts.written:,} + empty "
            f"{counts.empty:,} + rejected {stats.rejected:,}; {counts.tokens:,} tokens"
        )
    megabytes = stats.input_bytes / 1e6
    print(f"{megabytes:.1f} MB in {stats.seconds:.1f} s: {megabytes / max(stats.seconds, 1e-9):.1f} MB/s")


if __name__ == "__main__":
    sys.exit(main())
