"""Convert checkpoints: ours cut anew, to and from Hugging Face, to plain safetensors, from Megatron-LM and DeepSpeed.

    python tools/convert_checkpoint.py --load runs/gpt --save exported/gpt --to hf
    python tools/convert_checkpoint.py --load runs/gpt --save exported/gpt --to safetensors --dtype bf16
    python tools/convert_checkpoint.py --load runs/gpt --save runs/gpt-tp8 --to megatron_lite --tensor 8 --data 4
    python tools/convert_checkpoint.py --load Llama-3.2-1B --save runs/llama --to megatron_lite
    python tools/convert_checkpoint.py --load megatron/checkpoints --save runs/gpt --to megatron_lite

Any layout reads any other, so that cutting anew is for moving files about: one a rank, few or many (--data 16 alone: 16
equal files), weights only.
What --to megatron_lite reads, besides ours: a Hugging Face folder; Megatron-LM's torch_dist; DeepSpeed's universal, of
Megatron-DeepSpeed's models. The optimizer state comes along where the format has it for every parameter. An import also
writes SAVE/config.json, a run that begins with what was imported, unless --config named one.
One parameter is in memory at a time. An export to hf is checked before it is called done: read back, every parameter
has the bits that were written; transformers loads it, and its logits must be those of our own model (one after the
other is in memory then, in fp32); its tokenizer must give our ids. --no-check leaves this out.
Exported weights get their names when all are on the disk: of an export that was killed there is no half, and the next
one into its folder clears away what it left. One conversion at a time writes in a folder.
Exit status: 0 done, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.checkpoint import CheckpointError, Reader, resolve
from megatron_lite.checkpoint.foreign import find_foreign, import_foreign
from megatron_lite.checkpoint.huggingface import (
    ARCHITECTURES,
    EXPORT_DTYPES,
    check_export,
    check_free,
    export_huggingface,
    import_huggingface,
    model_config,
    to_huggingface,
)
from megatron_lite.checkpoint.merge import merge
from megatron_lite.checkpoint.reshard import count_files, reshard
from megatron_lite.checkpoint.store import check_unused
from megatron_lite.command import command
from megatron_lite.config import load_config
from megatron_lite.tokenizers import load_tokenizer

_SOURCES = {
    "own": "a checkpoint of ours",
    "hugging_face": "a Hugging Face folder",
    "foreign": "a checkpoint of Megatron-LM or DeepSpeed",
}
# What each option is for: kinds of --to, or of what --load names where that is "megatron_lite".
_APPLIES = {
    "dtype": {"hf", "safetensors", "own"},
    "shard_gb": {"hf", "safetensors", "own"},
    "family": {"hf"},
    "tokenizer": {"hf"},
    "tensor": {"own"},
    "pipeline": {"own"},
    "data": {"own"},
    "weights_only": {"own", "foreign"},
    "config": {"foreign"},
}


@command("the conversion is not done, or was not checked")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    source = source_of(options.load)
    check_options(options, source)
    with held(options.save):
        convert(options, source)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="a step folder or a run's output directory (its newest whole checkpoint); a folder of another system",
    )
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--to", required=True, choices=("hf", "safetensors", "megatron_lite"), help="format to write"
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not verify what is read, nor read back what is written",
    )
    parser.add_argument("--dtype", choices=tuple(EXPORT_DTYPES), help="of the weights (as they are stored)")
    parser.add_argument("--shard-gb", type=float, metavar="GB", help="most of it in one file (5)")
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer state out")
    parser.add_argument(
        "--family",
        choices=tuple(ARCHITECTURES),
        help="hf: where the model fits two, llama and mistral (the one it was imported as, else llama)",
    )
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="hf: instead of the one the model was trained with"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="of the model, where what is imported does not say how it is made",
    )
    layout = parser.add_argument_group("layout to cut for; tensor x pipeline x data files")
    for name in ("tensor", "pipeline", "data"):
        layout.add_argument(f"--{name}", type=positive, metavar="N", help=f"{name}-parallel ranks (1)")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def source_of(path: Path) -> str:
    """What kind of checkpoint a folder holds, a key of _SOURCES."""
    if find_foreign(path) is not None:
        return "foreign"
    ours = (path / "index.json").is_file() or (path / "checkpoints").is_dir()
    return "hugging_face" if (path / "config.json").is_file() and not ours else "own"


def check_options(options: argparse.Namespace, source: str) -> None:
    """Raises CheckpointError for options that would have no effect, and for a source that --to does not take."""
    if options.to != "megatron_lite" and source != "own":
        remedy = "import it first with --to megatron_lite, then convert what came of it"
        fault = f"{options.load} is {_SOURCES[source]}, and --to {options.to} takes one of ours"
        raise CheckpointError(f"{fault}; {remedy}")
    what = source if options.to == "megatron_lite" else options.to
    for name, kinds in _APPLIES.items():
        if getattr(options, name) not in (None, False) and what not in kinds:
            action = f"--to {options.to}" + (
                f" from {_SOURCES[source]}" if options.to == "megatron_lite" else ""
            )
            remedy = (
                "; import it first, then convert what came of it"
                if "own" in kinds and source != "own"
                else ""
            )
            raise CheckpointError(f"--{name.replace('_', '-')} has no effect with {action}{remedy}")
    if options.to == "megatron_lite" and options.dtype in ("bf16", "fp16") and not options.weights_only:
        fault = f"--dtype {options.dtype} rounds the fp32 weights that training goes on from"
        raise CheckpointError(f"{fault}; give --weights-only, too")
    if options.shard_gb is not None and (
        not options.shard_gb >= 1e-6 or options.tensor or options.pipeline or options.data
    ):
        raise CheckpointError(
            "--shard-gb must be at least 1e-6, and the files of a layout are as large as its ranks' parts"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other conversions out of a folder, which is made, and removed again where nothing was written.

    The lock is on the folder itself, so that no file of it can lie in an export, and goes with the process, however
    that ends. Where the file system has none for folders (NFS), a second conversion is not noticed.

    Raises CheckpointError where another conversion holds it, and where it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"--save {folder}: {error.strerror}; give another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = "wait for its end, stop it, or give another folder"
        raise CheckpointError(f"another conversion writes in {folder}; {remedy}") from None
    except OSError:
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        os.close(descriptor)


def convert(options: argparse.Namespace, source: str) -> None:
    if options.to == "hf":
        export(options)
    elif options.to == "safetensors":
        to_safetensors(options)
    elif source == "hugging_face":
        from_huggingface(options)
    elif source == "foreign":
        from_foreign(options)
    else:
        cut_anew(options)


def file_bytes(options: argparse.Namespace) -> int:
    return math.ceil(min(5.0 if options.shard_gb is None else options.shard_gb, 1e9) * 1e9)


def verified(options: argparse.Namespace) -> Path:
    """The step folder of ours that --load means, what is taken from it read through; before, that --save is free."""
    (check_unused if options.to == "megatron_lite" else check_free)(options.save)
    if options.no_check:
        return resolve(options.load)
    weights = options.to != "megatron_lite" or options.weights_only
    source = resolve(options.load, checksums="weight" if weights else True)
    print(f"{source}: every checksum{' of its weights' if weights else ''} right")
    return source


def cut_anew(options: argparse.Namespace) -> None:
    source, dtype = verified(options), EXPORT_DTYPES.get(options.dtype)
    layout = {name: getattr(options, name) or 1 for name in ("tensor", "pipeline", "data")}
    if not (options.tensor or options.pipeline or options.data):
        wanted = file_bytes(options)
        layout["data"] = count_files(source, wanted, weights_only=options.weights_only, dtype=dtype)
    step = reshard(source, options.save, **layout, weights_only=options.weights_only, dtype=dtype)
    with Reader(step) as reader:
        size = sum(file.stat().st_size for file in step.iterdir())
        count = len(reader.files)
        print(
            f"{step}: {count} {'file' if count == 1 else 'files'}, {size / 1e9:.3f} GB, holds {', '.join(reader.kinds)}"
        )


def to_safetensors(options: argparse.Namespace) -> None:
    source, wanted = verified(options), file_bytes(options)
    files = merge(source, options.save, dtype=EXPORT_DTYPES.get(options.dtype), file_bytes=wanted)
    print(
        f"{options.save}: weights under their own names in {', '.join(files[:3])}{' …' if files[3:] else ''}"
    )


def from_foreign(options: argparse.Namespace) -> None:
    source = find_foreign(options.load)
    assert source is not None, "options.load was looked at"
    config = load_config(options.config) if options.config else None
    imported = import_foreign(source, options.save, config=config, weights_only=options.weights_only)
    say_imported(imported.folder, options)
    model = imported.model
    print(f"vocabulary of {model.vocab_size} tokens, {model.padded_vocab_size} rows")
    if imported.lost is not None:
        print(f"weights only: {imported.lost}")
    if config is None:
        say_start(options.save)
        return
    settings = f"--config {options.config} --set checkpoint.load={options.save}"
    if imported.lost is not None:
        settings += " --set checkpoint.weights_only=true"
    print(f"start a run from it with {settings}")


def export(options: argparse.Namespace) -> None:
    # What is wrong with the options is told before gigabytes are read.
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)
    with Reader(resolve(options.load)) as reader:
        to_huggingface(model_config(reader), "float32", family=options.family)
    source = verified(options)
    exported = export_huggingface(
        source,
        options.save,
        dtype=EXPORT_DTYPES.get(options.dtype),
        shard_bytes=file_bytes(options),
        family=options.family,
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
        lines = check_export(source, options.save, options.tokenizer)
        print("\n".join(lines))
        if any("gives other ids than" in line for line in lines):
            raise CheckpointError(
                f"{options.save}: the weights are right, but transformers' AutoTokenizer gives other ids (see above): "
                "read the tokenizer as said there; --no-check exports without this error"
            )


def from_huggingface(options: argparse.Namespace) -> None:
    say_imported(import_huggingface(options.load, options.save), options)
    say_start(options.save)


def say_imported(step: Path, options: argparse.Namespace) -> None:
    with Reader(step) as reader:
        if not options.no_check:
            reader.verify()
        print(f"{step}: {len(reader.names())} parameters, holds {', '.join(reader.kinds)}")


def say_start(save: Path) -> None:
    """How a run begins with an import: what its configuration lacks is named."""
    path = save / "config.json"
    tokenizer = load_config(path).data.tokenizer
    if tokenizer is None:
        print("tokenizer: none was found; data.tokenizer must be the one the model was trained with")
    else:
        print(f"tokenizer: {tokenizer}, with which the data must be made")
    missing = "data.train=PREFIX" + (" --set data.tokenizer=SPEC" if tokenizer is None else "")
    print(f"start a run from it with --config {path} --set {missing} --set train.steps=N")


if __name__ == "__main__":
    sys.exit(main())
