"""Train a tokenizer on a corpus, check that held-out text comes back from it, and compare it with others.

A share of the documents is held out of training (always the same ones); the table is measured on them. Without --kind
nothing is trained, and the tokenizers of --compare are measured on the beginning of the input.

Exit status: 0 done, 2 bad input or settings (nothing is written then), 3 done, but bad input was left out,
130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from megatron_lite.command import command
from megatron_lite.corpus.files import check_output, expand_inputs, refuse_overwriting
from megatron_lite.corpus.held_out import TrainingTexts, first_samples
from megatron_lite.corpus.workers import one_interrupt, worker_processes
from megatron_lite.tokenizers import load_tokenizer
from megatron_lite.tokenizers.huggingface import find_gpt2_files
from megatron_lite.tokenizers.measure import Sample, measure, table
from megatron_lite.tokenizers.train import KINDS, Trained, check_settings, train_tokenizer
from megatron_lite.tokenizers.train_sentencepiece import LINES


@command("nothing was written")
def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not 0 <= options.held_out_share < 1:
        parser.error("--held-out-share is at least 0 and less than 1")
    if options.kind is None and not options.compare:
        parser.error("nothing to do: give --kind to train, --compare to measure, or both")
    _log()
    with one_interrupt():
        return run(options)


def run(options: argparse.Namespace) -> int:
    """Train, measure, print. Everything that can be wrong is looked at before training."""
    others = [load_tokenizer(spec) for spec in options.compare]
    if options.kind is not None:
        check_settings(options.kind, options.output, options.vocab_size, options.special_tokens)
    inputs, measured = expand_inputs(options.input), expand_inputs(options.held_out or options.input)
    if options.output is not None and options.kind not in (None, "byte"):
        files = [path for spec in options.compare for path in files_of(spec)]
        refuse_overwriting([*inputs, *measured, *files], [options.output])
        check_output(options.output, "--output")
    share = 0.0 if options.held_out else options.held_out_share
    texts = TrainingTexts(inputs, share, options.text_key, options.on_error)
    held_out = TrainingTexts(measured, 0.0, options.text_key, options.on_error)
    samples = first_samples(held_out) if options.held_out or options.kind is None else []
    trained = []
    if options.kind is not None:
        spec, texts = train(options, texts)
        trained = [spec]
        samples = samples or texts.held_out
    if not samples:
        print("no document fell into the held-out share: measured on text that was trained on")
        samples = texts.seen
    try:
        report([load_tokenizer(spec) for spec in trained] + others, samples)
    except KeyboardInterrupt:
        if options.kind in (None, "byte"):
            raise
        print(f"interrupted: {options.output} is written, but was not measured", file=sys.stderr)
        return 130
    return 3 if texts.rejected + held_out.rejected else 0


def files_of(spec: str) -> list[str | Path]:
    """The files of a tokenizer that `load_tokenizer` has taken."""
    kind, separator, path = spec.partition(":")
    place = Path(path if separator else spec)
    if spec == "byte":
        return []
    for file in (place, place / "tokenizer.json"):
        if kind != "gpt2" and file.is_file():
            return [file]
    return [*find_gpt2_files(place)]


def train(options: argparse.Namespace, texts: TrainingTexts) -> tuple[str, TrainingTexts]:
    """Train on `texts`; returns the specification to load the tokenizer by, and `texts` as they are afterwards."""
    if options.kind == "byte":
        for _ in texts:  # for the held-out ones among them
            pass
        result = train_tokenizer("byte", texts, None, options.vocab_size, options.special_tokens)
    else:
        # In a process of its own: the libraries hear no Ctrl-C for minutes, and it can be killed.
        with worker_processes(1, _log, remedy="less text") as pool:
            result, texts = pool.submit(_train, options, texts).result()
    held_out = f", {len(texts.held_out):,} of them held out" if texts.held_out else ""
    print(f"{result.spec}: {texts.documents:,} documents{held_out}; rejected {texts.rejected:,}")
    for name, number in result.special.items():
        print(f"special token {name}: id {number}")
    return result.spec, texts


def _train(options: argparse.Namespace, texts: TrainingTexts) -> tuple[Trained, TrainingTexts]:
    result = train_tokenizer(
        options.kind, texts, options.output, options.vocab_size, options.special_tokens, options.lines
    )
    return result, texts


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def report(tokenizers: list, samples: list[Sample]) -> None:
    """The table over `samples`, and the first document that does not come back from each tokenizer."""
    results = [measure(tokenizer, samples) for tokenizer in tokenizers]
    first = results[0]
    print(f"measured on {first.documents:,} documents, {first.bytes:,} bytes, {first.words:,} words\n")
    print(table(results))
    for result in results:
        if result.failure is not None:
            print(f"{result.name} does not give back {result.failure}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    parser.add_argument("--kind", choices=KINDS, help="what to train (byte needs none and is only measured)")
    parser.add_argument("--output", metavar="FILE", help=".json (char, word, bpe) or .model (sentencepiece)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="entries in all; char and word: all there are, if not given",
    )
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="NAME", help="ids besides the end of a document"
    )
    parser.add_argument(
        "--lines", type=int, default=LINES, metavar="N", help=f"lines that SentencePiece samples ({LINES:,})"
    )
    parser.add_argument(
        "--held-out-share", type=float, default=0.01, metavar="SHARE", help="of the documents (0.01); 0: none"
    )
    parser.add_argument("--held-out", nargs="+", metavar="PATH", help="files to measure on instead")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="SPEC", help="byte, hf:FILE, tiktoken:FILE …"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="the field that holds the text")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a record without a usable text"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
