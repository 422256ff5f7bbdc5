"""Say what a checkpoint holds: training position, parameters with their shapes, types and norms.

    python tools/inspect_checkpoint.py runs/gpt [--verify] [--norms]

Exit status: 0 done, 2 no checkpoint there or a damaged one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

from megatron_lite.checkpoint import CheckpointError, Reader, resolve


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="a step folder, a checkpoints folder or a run's output directory")
    parser.add_argument("--verify", action="store_true", help="read every byte and check it")
    parser.add_argument("--norms", action="store_true", help="L2 norm of each parameter and of its moments")
    options = parser.parse_args(arguments)
    try:
        with Reader(resolve(options.path)) as reader:
            if options.verify:
                reader.verify()
                print(f"verified: every checksum of {len(reader.files)} files is right")
            show(reader, options.norms)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(reader: Reader, norms: bool) -> None:
    print(f"{reader.path}: step {reader.step}, {len(reader.files)} files, holds {', '.join(reader.kinds)}")
    for key, value in reader.metadata.items():
        if key != "config":  # pages of it; index.json has it
            print(f"{key} {json.dumps(value)}")
    total = 0
    width = max(len(name) for name in reader.names())
    for name in reader.names():
        shape = reader.shape(name)
        total += math.prod(shape)
        dtype = str(reader.dtype(name)).removeprefix("torch.")
        line = f"{name:{width}}  {dtype:8}  {list(shape)!s:20}"
        if norms:
            for kind in reader.kinds:
                line += f"  |{kind}| {float(reader.read(name, kind).float().norm()):.6g}"
        print(line.rstrip())
    print(f"parameters {total:,} in {len(reader.names())} tensors")


if __name__ == "__main__":
    sys.exit(main())
