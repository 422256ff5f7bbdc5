"""`python -m megatron_lite.config FILE [--set KEY=VALUE ...] [--world N]`: check, print in full."""

from __future__ import annotations

import argparse
import json
import sys

from .errors import ConfigError
from .load import load_config
from .schema import json_schema
from .tree import Config


def main(arguments: list[str] | None = None) -> int:
    """Print the resolved tree and return 0, or say what is wrong and return 2."""
    parser = argparse.ArgumentParser(prog="python -m megatron_lite.config", description=__doc__)
    parser.add_argument("file", nargs="?", help="configuration, a JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON for the deepspeed section")
    parser.add_argument("--world", type=int, metavar="N", help="check the layout against N ranks")
    parser.add_argument("--files", action="store_true", help="check that data and tokenizer are there")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema instead")
    args = parser.parse_args(arguments)
    if args.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    if args.file is None:
        parser.error("FILE is required")
    try:
        config = load_config(
            args.file, args.set, args.deepspeed_config, world_size=args.world, check_files=args.files
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(config.resolved(), indent=2))
    _summarise(config, args.world)
    return 0


def _summarise(config: Config, world_size: int | None) -> None:
    """What the file means, on the error stream, so that the output stays JSON."""
    if config.model.vocab_size is not None:
        count, flops = config.model.parameter_count(), config.model.flops_per_token()
        print(f"{count:,} parameters, {flops / 1e9:.3f} GFLOP a token", file=sys.stderr)
    if world_size is not None:
        copies, steps = config.data_parallel_size(world_size), config.accumulation_steps(world_size)
        print(f"data-parallel size {copies}, {steps} micro-batches a step", file=sys.stderr)
        for warning in config.warnings(world_size):
            print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
