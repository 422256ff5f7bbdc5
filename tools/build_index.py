"""Build the sample indices of a run ahead of it, so that training starts at once.

    python tools/build_index.py --config configs/example.json --set data.train=corpus/text_document

They go where training looks for them: data.cache_dir, or beside the data. On nodes without a shared file system run
it on each. What is there already and intact stays; a run that goes on with other settings builds its own.

Exit status: 0 done, 2 bad data or settings.
"""

from __future__ import annotations

import argparse
import logging
import sys

from megatron_lite.command import command
from megatron_lite.config import load_config
from megatron_lite.data.audit import read_checkpoint
from megatron_lite.data.build import build_run


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="that the run will have")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    parser.add_argument(
        "--resume", metavar="DIR", help="for going on from this checkpoint, or the newest of this run"
    )
    options = parser.parse_args(arguments)
    log, handler = logging.getLogger("megatron_lite"), logging.StreamHandler(sys.stdout)
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        config = load_config(options.config, options.overrides)
        progress = (
            read_checkpoint(options.resume)[2] if options.resume else {"step": 0, "consumed_samples": 0}
        )
        data = build_run(config, progress["step"], progress["consumed_samples"], progress.get("data"))
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    counts = {"training": data.train, "validation": data.valid, "test": data.test}
    print(", ".join(f"{len(part):,} {name} samples" for name, part in counts.items() if part is not None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
