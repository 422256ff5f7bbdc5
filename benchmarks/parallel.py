"""What each dimension of parallelism costs: the same model and global batch on several layouts.

On a CPU all ranks share the machine's cores: the threads that one rank would use are divided among them, so no
layout can be faster than one rank but by luck, and what is shown is overhead: communication, pipeline bubbles,
smaller matrices, work that every rank repeats. It says nothing of how a layout scales where each rank has a
processor of its own. Every layout runs the same micro-batch size, so data parallelism accumulates fewer of them.
"""

import sys

import torch
from bare import ROOT
from common import describe, header, parse, parser, read_config, table
from ours import engine_step
from teams import Side, take_turns

OVERRIDES = (
    "model.vocab_size=65",
    "model.make_vocab_size_divisible_by=128",
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
)
# Name -> (ranks, settings). ZeRO is 1 where nothing else is said, as in every run.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 rank": (1, ()),
    "TP2": (2, ("parallel.tensor=2",)),
    "TP2 + sequence parallel": (2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "PP2": (2, ("parallel.pipeline=2",)),
    "DP2, ZeRO-1": (2, ("deepspeed.zero_optimization.stage=1",)),
    "DP2, ZeRO-2": (2, ("deepspeed.zero_optimization.stage=2",)),
    "DP2, ZeRO-3": (2, ("deepspeed.zero_optimization.stage=3",)),
    "TP2 x PP2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
}


def main() -> None:
    made = parser(__doc__, rounds=5, steps=1)
    made.add_argument("--config", default=str(ROOT / "configs/shakespeare_char.json"), help="%(default)s")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="%(default)s")
    options = parse(made)
    processors = torch.cuda.device_count() if options.device == "cuda" else None
    common = (*OVERRIDES, f"train.precision={options.precision}")
    config = read_config(options, options.config, *common)
    sides = []
    for name, (ranks, settings) in LAYOUTS.items():
        if processors is not None and ranks > processors:
            print(f"left out, for want of {ranks} GPUs: {name}", file=sys.stderr)
            continue
        args = (read_config(options, options.config, *common, *settings), ranks, options.device)
        sides.append(Side(name, engine_step, args, options.device, options.threads, ranks))
    results = take_turns(sides, options.rounds, options.steps)
    print(header(options, f"{options.rounds} rounds of {options.steps} steps a side, alternating"))
    print(describe(config))
    tokens = config.train.global_batch_size * config.model.seq_length
    print(f"\n{options.precision}\n\n{table(results, tokens, [sides[0].name])}")


if __name__ == "__main__":
    main()
