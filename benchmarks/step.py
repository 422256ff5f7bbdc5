"""Tokens a second of our training step, in one process, against plain PyTorch of the same model.

Ours is the engine that a training run builds (with DeepSpeed, as always); the plain one is nanoGPT's way
(plain_gpt.py). All sides take turns in one run, and ratios are taken within each round. The default model is
nanoGPT's character model with a batch of 16 and no dropout; `--config configs/tiny.json` is quicker, and
`--set model.hidden_dropout=0.2 --set model.attention_dropout=0.2` is the model as published.
"""

import torch
from common import Side, Step, engine_step, global_batch, header, parser, read_config, table, take_turns

from megatron_lite.config import Config

OVERRIDES = (
    "model.vocab_size=65",
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
    "train.micro_batch_size=16",
    "train.global_batch_size=16",
)
OURS, PLAIN = "megatron_lite", "plain PyTorch"


def build_plain(rank: int, store: str, config: Config, device: str, compiled: bool) -> Step:
    """One training step of the plain model."""
    from plain_gpt import PlainGPT, plain_step

    torch.manual_seed(config.train.seed)
    model = PlainGPT(config.model).to(device)
    parts = [
        torch.from_numpy(part).to(device).split(config.train.micro_batch_size)
        for part in global_batch(config)
    ]
    step = plain_step(model, config, list(zip(*parts, strict=True)), compiled)
    return step


def sides(config: Config, device: str, compiled: bool) -> list[Side]:
    """What is compared, our side first and the plain one second."""

    def ours(name: str, allocator: bool) -> Side:
        kernels = config.kernels.model_copy(update={"cpu_allocator": allocator})
        args = (config.model_copy(update={"kernels": kernels}), 1, device)
        return Side(name, engine_step, args, device)

    def plain(name: str, compiled: bool) -> Side:
        return Side(name, build_plain, (config, device, compiled), device)

    made = [ours(OURS, True), plain(PLAIN, False)]
    if device == "cpu":
        made.append(ours(f"{OURS}, kernels.cpu_allocator=false", False))
    if compiled:
        made.append(plain(f"{PLAIN}, torch.compile", True))
    return made


def main() -> None:
    made = parser(__doc__, rounds=6, steps=2)
    made.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="default: both")
    made.add_argument("--compile", action="store_true", help="also the plain model under torch.compile")
    options = made.parse_args()
    first = True
    for precision in options.precision or ("fp32", "bf16"):
        config = read_config(options, *OVERRIDES, f"train.precision={precision}")
        if first:
            print(header(options, config))
            first = False
        compared = sides(config, options.device, options.compile)
        seconds, peaks = take_turns(compared, options.rounds, options.steps)
        tokens = config.train.global_batch_size * config.model.seq_length
        print(f"\n{precision}\n\n{table(compared, tokens, seconds, peaks, baseline=1)}", flush=True)


if __name__ == "__main__":
    main()
