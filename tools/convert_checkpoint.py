"""Convert a checkpoint to a Hugging Face folder, or a Hugging Face folder to a checkpoint.

    python tools/convert_checkpoint.py --load runs/gpt --save exported/gpt --to hf
    python tools/convert_checkpoint.py --load Llama-3.2-1B --save runs/llama --to megatron_lite

One parameter is in memory at a time. An export is checked before it is called done: read back, every parameter has the
bits that were written; transformers loads it, and its logits must be those of our own model (one after the other is in
memory then, in fp32); its tokenizer must give our ids. --no-check leaves this out.
Exit status: 0 done, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.checkpoint import Reader, resolve
from megatron_lite.checkpoint.huggingface import (
    EXPORT_DTYPES,
    check_export,
    export_huggingface,
    import_huggingface,
    tokenizer_of,
)


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
    parser.add_argument("--no-check", action="store_true", help="do not read an export back and compare it")
    export = parser.add_argument_group("exports")
    export.add_argument("--dtype", choices=tuple(EXPORT_DTYPES), help="of the weights; as they are stored")
    export.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="most weights in one file (%(default)s)"
    )
    export.add_argument("--tokenizer", metavar="SPEC", help="instead of the one the model was trained with")
    options = parser.parse_args(arguments)
    try:
        if options.to == "hf":
            to_huggingface(options)
        else:
            to_megatron_lite(options.load, options.save)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def to_huggingface(options: argparse.Namespace) -> None:
    source = resolve(options.load)
    with Reader(source) as reader:
        reader.verify()
    print(f"{source}: whole, every checksum right")
    exported = export_huggingface(
        source,
        options.save,
        dtype=EXPORT_DTYPES.get(options.dtype),
        shard_bytes=int(options.shard_gb * 1e9),
        tokenizer=options.tokenizer,
    )
    model, files = exported.model, len(exported.files)
    print(
        f"{options.save}: {exported.config['architectures'][0]} in {exported.config['torch_dtype']}, "
        f"{files} {'file' if files == 1 else 'files'} of weights, "
        f"{model.vocab_size} of {model.padded_vocab_size} vocabulary rows"
    )
    print(f"tokenizer: {exported.tokenizer}")
    if not options.no_check:
        for line in check_export(source, options.save, options.tokenizer):
            print(line)


def to_megatron_lite(load: Path, save: Path) -> None:
    step = import_huggingface(load, save)
    with Reader(step) as reader:
        reader.verify()
        print(f"{step}: {len(reader.names())} parameters, weights only")
    tokenizer = tokenizer_of(load.resolve())
    settings = f"--set checkpoint.load={save} --set checkpoint.weights_only=true"
    if tokenizer is None:
        print("tokenizer: none in the folder that we read")
    else:
        settings += f" --set data.tokenizer={tokenizer}"
    print(f"start a run from it with {settings}")


if __name__ == "__main__":
    sys.exit(main())
