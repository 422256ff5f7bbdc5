#!/usr/bin/env python3
"""Pretrains a GPT: the main job, under `deepspeed`, `torchrun`, `srun` or plain `python`.

deepspeed pretrain_gpt.py --config configs/gpt_1.3b.json --set data.train=PREFIX

Exit status: 0 the run ended as asked, 2 bad settings, data or checkpoint (before a step is taken), 1 the run failed.
"""

import argparse
import logging
import os
import sys
import traceback

from megatron_lite.config import load_config
from megatron_lite.parallel.launch import Launch, choose_device, detect_launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add, launch = parser.add_argument, Launch()
    add("--config", required=True, metavar="FILE", help="JSON file with every setting")
    add("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one; may be repeated")
    add("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON, merged into the deepspeed section")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        launch = detect_launch()
        files = (options.config, options.set, options.deepspeed_config)
        config = load_config(*files, world_size=launch.world_size, check_files=True)
        config.check_device(choose_device(config.train.device, launch).type)
        level = config.logging.level.upper() if launch.is_first else "ERROR"
        logging.getLogger("megatron_lite").setLevel(level)
        # Imports DeepSpeed, which takes a second: only for good settings.
        from megatron_lite.training.loop import start, train
        from megatron_lite.training.resilience import RunFailed

        run = start(config, launch)
    except ValueError as error:
        return complain(error, launch.local_rank == 0, status=2)
    try:
        train(run)
    except RunFailed as error:
        return complain(error, launch.is_first or not error.shared, status=1)
    return 0


def complain(error: Exception, speak: bool, status: int) -> int:
    if speak:
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    # Leave at once: after a failure, waiting for peers in the process group's destructor could hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
