"""Take out of a corpus what it holds more than once, and what evaluations ask. One file of JSON lines comes out.

Input is JSON lines, plain text, Parquet, WARC or WET, also compressed. Rules work in the order of their options below;
the first of what is alike stays. Lines that nothing changes are copied byte for byte, other fields pass through, and
the output is the same for any number of workers and any memory. Intermediate files lie in a hidden folder beside it.

Exit status: 0 done, 2 bad input or settings (nothing is written then), 3 done, but bad input was left out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from megatron_lite.command import command
from megatron_lite.corpus.dedup import Decontaminate, Exact, Lines, MinHash, Substrings, dedup_corpus
from megatron_lite.corpus.workers import one_interrupt


@command("nothing is written")
def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    rules = _rules(options)
    if not rules:
        parser.error("give at least one rule: --exact, --lines, --substrings, --minhash or --decontaminate")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = options.report or f"{options.output}.report.json"
    with one_interrupt():
        report = dedup_corpus(
            options.input,
            options.output,
            rules,
            text_key=options.text_key,
            workers=options.workers,
            memory=options.memory << 20,
            on_error=options.on_error,
            report=path,
        )
    _print(report)
    print(f"report: {path}")
    return 3 if report["documents"]["rejected"] else 0


def _rules(options: argparse.Namespace) -> list[Any]:
    rules: list[Any] = []
    if options.exact:
        rules.append(Exact(options.exact == "normalized"))
    if options.lines:
        rules.append(Lines(options.lines, options.min_bytes))
    if options.substrings:
        rules.append(Substrings(options.substrings))
    if options.minhash:
        rules.append(MinHash(options.ngram, options.bands, options.rows, options.verify, options.seed))
    if options.decontaminate:
        cut = "span" if options.cut_spans else "document"
        minimum = min(Decontaminate._field_defaults["minimum"], options.words)
        rules.append(
            Decontaminate(options.decontaminate, options.evaluation_key, options.words, minimum, cut)
        )
    return rules


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    add("--output", required=True, metavar="FILE", help=".jsonl, also .jsonl.gz or .jsonl.zst")
    add("--report", metavar="FILE", help="counts and examples as JSON; OUTPUT.report.json if not given")
    add("--text-key", default="text", metavar="KEY", help="the field that holds the text")
    add("--workers", type=int, default=1, help="processes that read")
    add(
        "--memory",
        type=int,
        default=1024,
        metavar="MB",
        help="for sorting, all workers together (%(default)s)",
    )
    add("--on-error", choices=("stop", "skip"), default="stop", help="at a record without a usable text")

    add = parser.add_argument_group("rules").add_argument
    add(
        "--exact",
        choices=("text", "normalized"),
        nargs="?",
        const="text",
        help="drop documents whose text stood before; normalized: whatever its case and white space",
    )
    add(
        "--lines",
        choices=("line", "paragraph"),
        nargs="?",
        const="line",
        help="take out lines that stood in an earlier document",
    )
    add("--min-bytes", type=int, default=40, metavar="N", help="shorter lines are left alone (%(default)s)")
    add("--substrings", type=int, metavar="N", help="take out every span of N bytes that stood before")
    add("--minhash", action="store_true", help="of documents that share most of their word n-grams keep one")
    add("--ngram", type=int, default=5, metavar="N", help="words (%(default)s)")
    add("--bands", type=int, default=14, metavar="N", help="%(default)s")
    add("--rows", type=int, default=8, metavar="N", help="of a band (%(default)s)")
    add("--verify", type=float, default=0.0, metavar="S", help="drop only what is this similar to what stays")
    add("--seed", type=int, default=1, metavar="N", help="of the hashes (%(default)s)")
    add("--decontaminate", nargs="+", metavar="PATH", help="drop documents with runs of words of these texts")
    add("--evaluation-key", default="text", metavar="KEY", help="the field of those texts")
    add("--words", type=int, default=13, metavar="N", help="of a run (%(default)s)")
    add("--cut-spans", action="store_true", help="take the runs out with 200 bytes around them instead")
    return parser


def _print(report: dict[str, Any]) -> None:
    documents, size, seconds = report["documents"], report["bytes"], report["seconds"]
    for rule in report["rules"]:
        name = rule["rule"]
        print(
            f"{name}: dropped {rule['documents']:,} documents, {rule['bytes']:,} bytes, and cut {rule['cut_bytes']:,} "
            f"bytes out of others, in {seconds[name]:.1f} s"
        )
    print(
        f"documents read {documents['read']:,} = kept {documents['kept']:,} + dropped {documents['dropped']:,} "
        f"+ rejected {documents['rejected']:,}"
    )
    print(
        f"bytes of text {size['read']:,} = kept {size['kept']:,} + dropped {size['dropped']:,} + cut {size['cut']:,}; "
        f"{size['read'] / 1e6 / max(seconds['total'], 1e-9):.1f} MB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
