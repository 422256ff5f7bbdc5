"""Convert a checkpoint to a Hugging Face folder, or a Hugging Face folder to a checkpoint.

    python tools/convert_checkpoint.py --load runs/gpt --save exported/gpt --to hf
    python tools/convert_checkpoint.py --load Llama-3.2-1B --save runs/llama --to megatron_lite

One parameter is in memory at a time. An export is checked before it is called done: transformers loads it,
and its logits must be those of our own model (both are in memory then; --no-check leaves it out).
Exit status: 0 done, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.checkpoint import Reader, resolve
from megatron_lite.checkpoint.huggingface import compare_logits, export_huggingface, import_huggingface


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="a step folder or a run's output directory (its newest whole checkpoint); a Hugging Face folder",
    )
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--to", required=True, choices=("hf", "megatron_lite"), help="format to write")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits of an export")
    options = parser.parse_args(arguments)
    try:
        if options.to == "hf":
            to_huggingface(options.load, options.save, check=not options.no_check)
        else:
            to_megatron_lite(options.load, options.save)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def to_huggingface(load: Path, save: Path, check: bool) -> None:
    source = resolve(load)
    with Reader(source) as reader:
        reader.verify()
    print(f"{source}: whole, every checksum right")
    model = export_huggingface(source, save)
    print(f"{save}: weights and config.json, {model.vocab_size} of {model.padded_vocab_size} vocabulary rows")
    if not check:
        return
    difference = compare_logits(source, save)
    if difference is None:
        print("not checked: transformers is not installed")
    else:
        print(f"checked: transformers' logits differ from ours by at most {difference:.1e} of the largest")


def to_megatron_lite(load: Path, save: Path) -> None:
    step = import_huggingface(load, save)
    with Reader(step) as reader:
        reader.verify()
        print(f"{step}: {len(reader.names())} parameters, weights only")
    print(f"start a run from it with --set checkpoint.load={save} --set checkpoint.weights_only=true")


if __name__ == "__main__":
    sys.exit(main())
