"""Say what a training run has consumed of its data: per source samples, tokens, epochs and documents.

    python tools/audit_data.py runs/example --list consumed.tsv

Exit status: 0 done, 2 no checkpoint, an old one, or other data than the run has read.
"""

from __future__ import annotations

import argparse
import sys

from megatron_lite.command import command
from megatron_lite.data.audit import audit, describe, write_list


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run's output folder, or one of its checkpoints")
    parser.add_argument(
        "--list", metavar="FILE.tsv", help="write every document of which anything was consumed"
    )
    options = parser.parse_args(arguments)
    step, sources = audit(options.checkpoint)
    print(f"step {step}, {sum(source.samples for source in sources):,} samples")
    for source in sources:
        print(describe(source))
    if options.list:
        write_list(options.list, sources)
    return 0


if __name__ == "__main__":
    sys.exit(main())
