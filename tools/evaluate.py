"""The held-out loss of a checkpoint, in one process, whatever layout wrote it.

The data, split and number of batches are those of the training run, so the figure is the one the run reported at
that step; --data takes other data whole. The checkpoint is read through before, and where the newest of a run is
damaged, the one before it is evaluated, with a warning.

    python tools/evaluate.py --load runs/example

Exit status: 0 done, 2 bad input or settings.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys

from megatron_lite.checkpoint import Reader, resolve
from megatron_lite.command import command
from megatron_lite.config import Config, DataConfig
from megatron_lite.config.sections import prefixes
from megatron_lite.data.build import build_dataset
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.loader import DataLoader, make_loader
from megatron_lite.data.sidecar import check_datasets, read_sidecar
from megatron_lite.inference import load_model, open_tokenizer, read_config
from megatron_lite.inference.evaluate import mean_loss
from megatron_lite.model.runtime import DTYPES
from megatron_lite.parallel.launch import choose_device, detect_launch
from megatron_lite.tokenizers import Tokenizer


@command()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR",
        help="a run's output folder, one of its checkpoints, or its weights folder",
    )
    parser.add_argument("--data", metavar="PREFIX", help="evaluate on all of this instead of the run's split")
    parser.add_argument("--tokenizer", metavar="SPEC", help="instead of the one the model was trained with")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="global batches at the most; default as the run"
    )
    parser.add_argument("--no-check", action="store_true", help="do not verify the checkpoint's checksums")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the one trained in")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps {options.steps}: at least 1")
    print(evaluate(options))
    return 0


def evaluate(options: argparse.Namespace) -> str:
    """The result as a line of text."""
    device = choose_device(options.device, detect_launch())
    with Reader(resolve(options.load, checksums=not options.no_check and "weight")) as reader:
        config = read_config(reader)
        try:
            loader, steps = held_out(config, options)
        except DatasetError as error:
            remedy = "" if options.data else "; for data elsewhere give --data PREFIX, all of which is taken"
            raise ValueError(f"{error}{remedy}") from error
        dtype = DTYPES[options.dtype or config.train.precision]
        model = load_model(reader, config, dtype=dtype, device=device)
        loss, tokens = mean_loss(model, loader, steps)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # which a float does not hold
    return (
        f"{reader.path}: step {reader.step} | {options.split} loss {loss:.6f} | perplexity {perplexity:.2f} | "
        f"{tokens:,} tokens"
    )


def held_out(config: Config, options: argparse.Namespace) -> tuple[DataLoader, int]:
    """The batches to evaluate on, and how many."""
    train, data, steps = config.train, config.data, options.steps or config.train.eval_steps
    if options.data:
        data = data.model_copy(update={"train": options.data, "valid": options.data, "test": options.data})
    if data.train is None:
        raise ValueError("the checkpoint names no data: give --data PREFIX, that of a .bin/.idx pair")
    size = steps * train.global_batch_size
    tokenizer = open_tokenizer(config, options.tokenizer)
    if tokenizer is not None:
        check_tokenizer(data, tokenizer)
    check_datasets(data, None)
    dataset = build_dataset(data, options.split, config.model.seq_length, train.seed, size)
    if dataset is None:
        raise ValueError(
            f"the run has no {options.split} data: data.split is {data.split}; give --data PREFIX"
        )
    return make_loader(config, dataset, None if tokenizer is None else tokenizer.eod_id), steps


def check_tokenizer(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError for data that another tokenizer made."""
    for prefix in (prefix for value in (data.train, data.valid, data.test) for prefix in prefixes(value)):
        sidecar = read_sidecar(prefix)
        if sidecar is not None and sidecar.fingerprint != tokenizer.fingerprint():
            fault = f"{prefix}: made with another tokenizer, {sidecar.tokenizer}, than {tokenizer.name}"
            remedy = f"give --data made with {tokenizer.name}"
            where = f"or --tokenizer {sidecar.tokenizer}, where the model was trained with that one"
            raise ValueError(f"{fault}; {remedy}, {where}")


if __name__ == "__main__":
    raise SystemExit(main())
