#!/usr/bin/env python3
"""Pretrains a GPT: the main job, under `deepspeed`, `torchrun`, `srun` or plain `python`.

deepspeed pretrain_gpt.py --config configs/gpt_1.3b.json --set data.train=PREFIX
"""

import argparse
import logging
import os
import sys
import traceback

from megatron_lite.config import load_config
from megatron_lite.parallel.launch import choose_device, detect_launch


def main() -> int:
    """Exit status: 0 the run ended as asked, 2 bad settings or data (before a model is built), 1 anything else."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="JSON file with every setting")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override one setting; may be repeated",
    )
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON, merged into the deepspeed section"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()

    launch = detect_launch()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        config = load_config(
            arguments.config,
            arguments.set,
            arguments.deepspeed_config,
            world_size=launch.world_size,
            check_files=True,
        )
        config.check_device(choose_device(config.train.device, launch).type)
        logging.getLogger("megatron_lite").setLevel(
            config.logging.level.upper() if launch.is_first else "ERROR"
        )

        from megatron_lite.training.loop import (
            start,
            train,
        )  # DeepSpeed is imported when the settings are good

        run = start(config, launch)
    except ValueError as error:
        if launch.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    train(run)
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    # Leave at once: after a failure, waiting for peers in the process group's destructor could hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
