#!/usr/bin/env python3
"""Tokenize text files to OUTPUT_PREFIX_KEY_document.{bin,idx}, byte for byte what Megatron-core writes, and a .json
that says how they were made. A run that was interrupted goes on where it was, by the same command.

    preprocess_data.py --input corpus/ --output-prefix data/corpus --tokenizer hf:tokenizer.json --append-eod

The flags of Megatron's preprocess_data.py are understood. Over many machines, each with its own I from 0 to N - 1:

    preprocess_data.py --shard I/N --input ... --output-prefix data/corpus ...
    preprocess_data.py --join --output-prefix data/corpus

Exit status: 0 done, 2 bad input or settings (nothing is written then), 3 done without bad documents, which were named.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from megatron_lite.command import command
from megatron_lite.corpus import EncodeSettings, EncodeStats, Progress, Shard, encode_corpus, join_shards
from megatron_lite.corpus.shards import WHOLE
from megatron_lite.corpus.workers import one_interrupt
from megatron_lite.tokenizers.megatron import TOKENIZER_TYPES, spec_of_megatron

# Megatron's flags that have no equal here, and why.
_REFUSED = {
    "find_optimal_num_workers": "there is little to find: take as many as there are cores; benchmarks/data.py measures",
    "tokenizer_special_tokens": "tokens are added to a vocabulary in its own files, before training and encoding",
    "tiktoken_special_tokens": "tokens are added to a vocabulary in its own files, before training and encoding",
    "tiktoken_pattern": "the name of a .tiktoken file says how text is divided",
    "tokenizer_metadata": "give the tokenizer itself: --tokenizer SPEC",
    "trust_remote_code": "code out of a tokenizer's folder is not run; tokenizer.json needs none",
}
# Those that have nothing to do here.
_IDLE = {
    "partitions": "the input is not divided: documents stay in their order, as with --keep-sequential-samples",
    "vocab_size": "the vocabulary's size is the tokenizer's",
    "padded_vocab_size": "the vocabulary's size is the tokenizer's",
    "vocab_extra_ids": "no ids are added to the tokenizer's",
}


@command("the same command goes on from here (--restart starts anew)")
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    check(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.join:
        for merged in join_shards(options.output_prefix):
            print(f"{merged.prefix}: documents {merged.documents:,}, tokens {merged.tokens:,}")
        return 0
    with one_interrupt():
        stats = encode_corpus(
            options.input,
            options.output_prefix,
            settings_of(options),
            workers=options.workers,
            on_error=options.on_error,
            max_documents=options.max_documents,
            shard=options.shard,
            restart=options.restart,
            progress=Progress(options.log_interval),
        )
    report(
        stats, options.shard.of(options.output_prefix), "sentence" if options.split_sentences else "document"
    )
    return 3 if stats.rejected else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, folders, globs: JSON lines, .txt, .parquet, .warc, .wet; .gz, .zst",
    )
    add("--output-prefix", required=True, metavar="PREFIX")
    add(
        "--tokenizer", metavar="SPEC", help="byte, hf:FILE, gpt2:FOLDER, tiktoken:FILE, sentencepiece:FILE, …"
    )
    add(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to write, a dataset each (text)"
    )
    add("--append-eod", action="store_true", help="end each document with the tokenizer's eod")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="at once (all cores: %(default)s)",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a line without a usable document (stop)",
    )
    add("--max-documents", type=int, metavar="N", help="take the first N documents only")
    add(
        "--special-tokens",
        choices=("plain", "parse"),
        default="plain",
        help="their names in a text are letters (plain), or the tokens",
    )
    add(
        "--encoder",
        choices=("auto", "gigatoken", "reference"),
        default="auto",
        help="gigatoken where it gives the ids of the tokenizer's own library (auto), always, or never",
    )
    add(
        "--verify",
        type=int,
        default=1000,
        metavar="N",
        help="of gigatoken's documents compare every N-th with the tokenizer's own library; 0: none (%(default)s)",
    )
    add("--restart", action="store_true", help="give up what an interrupted run has done")
    add(
        "--shard",
        type=shard_of,
        default=WHOLE,
        metavar="I/N",
        help="encode part I (from 0) of N, to PREFIX-I-of-N",
    )
    add("--join", action="store_true", help="put finished shards together")
    add_megatrons(parser)
    return parser


def add_megatrons(parser: argparse.ArgumentParser) -> None:
    """Flags that are Megatron's alone."""
    group = parser.add_argument_group("of Megatron")
    add = group.add_argument
    add(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        metavar="TYPE",
        help="GPT2BPETokenizer, Llama2Tokenizer, …, instead of --tokenizer",
    )
    add("--vocab-file", metavar="FILE")
    add("--merge-file", metavar="FILE")
    add("--tokenizer-model", metavar="PATH")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help="as here in any case")
    add(
        "--split-sentences",
        action="store_true",
        help="a sequence a sentence (needs NLTK), to PREFIX_KEY_sentence",
    )
    add("--lang", default="english", help="of the sentences (%(default)s)")
    add("--keep-newlines", action="store_true", help="line ends between sentences stay")
    add(
        "--log-interval",
        type=int,
        metavar="N",
        help="documents between lines of the log, where there is no terminal (10 s)",
    )
    add("--keep-sequential-samples", action="store_true", help="as here in any case")
    for name in ("partitions", "vocab-size", "padded-vocab-size", "vocab-extra-ids"):
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    for name in ("find-optimal-num-workers", "trust-remote-code"):
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in ("workers-to-check", "tokenizer-special-tokens", "tiktoken-special-tokens"):
        add(f"--{name}", nargs="+", help=argparse.SUPPRESS)
    for name in ("performance-dir", "tiktoken-pattern", "tokenizer-metadata"):
        add(f"--{name}", help=argparse.SUPPRESS)
    add("--dataset-impl", choices=("mmap",), help=argparse.SUPPRESS)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, reason in _REFUSED.items():
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')}: {reason}")
    for name, reason in _IDLE.items():
        if getattr(options, name):
            print(f"--{name.replace('_', '-')}: {reason}", file=sys.stderr)
    if not options.join:
        if not options.input:
            parser.error("--input is missing")
        if (options.tokenizer is None) == (options.tokenizer_type is None):
            parser.error("give --tokenizer SPEC, or Megatron's --tokenizer-type with its files")
    for name, least in (("workers", 1), ("max_documents", 1), ("log_interval", 1), ("verify", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is at least {least}")
    if options.keep_newlines and not options.split_sentences:
        parser.error("--keep-newlines is for --split-sentences; without it a document stays as it is")


def shard_of(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def settings_of(options: argparse.Namespace) -> EncodeSettings:
    spec = options.tokenizer or spec_of_megatron(
        options.tokenizer_type,
        options.vocab_file,
        options.merge_file,
        options.tokenizer_model,
        not options.tokenizer_hf_no_include_special_tokens,
    )
    return EncodeSettings(
        tokenizer=spec,
        keys=tuple(options.json_keys),
        append_eod=options.append_eod,
        special_tokens=options.special_tokens,
        encoder=options.encoder,
        verify=options.verify,
        language=options.lang if options.split_sentences else None,
        keep_newlines=options.keep_newlines,
    )


def report(stats: EncodeStats, prefix: str, level: str) -> None:
    for key, counts in stats.keys.items():
        print(
            f"{prefix}_{key}_{level}: documents read {stats.read:,} = written {counts.written:,} + empty "
            f"{counts.empty:,} + rejected {stats.rejected:,}; {counts.tokens:,} tokens"
        )
    megabytes = stats.input_bytes / 1e6
    print(f"{megabytes:.1f} MB in {stats.seconds:.1f} s: {megabytes / max(stats.seconds, 1e-9):.1f} MB/s")


if __name__ == "__main__":
    sys.exit(main())
