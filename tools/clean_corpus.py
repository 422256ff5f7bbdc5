"""Clean a corpus: repair its text, drop documents and lines that the enabled rules name, mask personal data.

Input is JSON lines, plain text, Parquet, WARC or WET, also compressed; output is JSON lines with every other field as
it was, in the order of the input. The defaults are the published rules for English web pages, where a line is a
paragraph: print them with --print-settings, and give what should differ in --settings FILE. For code, other languages
or text with wrapped lines begin with examples/cleaning/any_text.json, which repairs and masks and drops nothing.

Exit status: 0 done, 2 bad input or settings (nothing is written then), 3 done, but bad input was left out,
130 interrupted (Ctrl-C; nothing is written then).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from megatron_lite.command import command
from megatron_lite.corpus.cleaning import CleaningSettings, clean_corpus, load_settings
from megatron_lite.corpus.files import (
    CorpusError,
    check_output,
    expand_inputs,
    refuse_overwriting,
    writing,
)
from megatron_lite.corpus.workers import one_interrupt


@command("nothing was written")
def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers is at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = load_settings(options.settings) if options.settings else CleaningSettings()
    if options.print_settings:
        print(settings.model_dump_json(indent=2))
        return 0
    if not options.input or not options.output:
        parser.error("--input and --output are needed")
    with one_interrupt():
        return run(options, settings)


def run(options: argparse.Namespace, settings: CleaningSettings) -> int:
    """Clean and report. Whether all can be written is looked at before, and the report put in place last."""
    path = options.report or f"{options.output}.report.json"
    if os.path.realpath(path) in map(os.path.realpath, filter(None, (options.output, options.dropped))):
        raise CorpusError(f"--report {path}: named for documents too; take two files")
    inputs = expand_inputs(options.input)
    refuse_overwriting(inputs, [options.output, options.dropped, path])
    check_output(options.output, "--output")
    if options.dropped:
        check_output(options.dropped, "--dropped")
    check_output(path, "--report")
    with writing(path) as file:
        report = clean_corpus(
            inputs,
            options.output,
            settings,
            text_key=options.text_key,
            dropped_output=options.dropped,
            workers=options.workers,
            on_error=options.on_error,
        )
        file.write(report.to_json(settings.model_dump(mode="json")).encode())
    print(report)
    print(f"report: {path}")
    return 3 if report.rejected else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", metavar="PATH", help="files, folders or globs")
    parser.add_argument("--output", metavar="FILE", help=".jsonl, also .jsonl.gz or .jsonl.zst")
    parser.add_argument("--settings", metavar="FILE", help="JSON; what it leaves out has its default")
    parser.add_argument(
        "--print-settings",
        action="store_true",
        help="print the settings as JSON, with their defaults, and end",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="counts and examples as JSON; OUTPUT.report.json if not given"
    )
    parser.add_argument(
        "--dropped", metavar="FILE", help="write the dropped documents there, each with the reason"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="the field that holds the text")
    parser.add_argument("--workers", type=int, default=1, help="processes that clean; the output is the same")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a record without a usable text"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
