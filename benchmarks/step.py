"""Tokens a second of our training step, in one process, against plain PyTorch of the same model.

Ours is the engine that a training run builds (with DeepSpeed, as always); on a GPU machine without DeepSpeed it is our
model and operations in a plain loop with torch's fused AdamW, and the table says so. The plain one is nanoGPT's way
(plain_gpt.py). On a CPU all sides take turns in one run, and ratios are taken within each round; on a GPU a side does
all its rounds before the next is built, for the sake of its memory. MFU counts attention as Megatron-LM does, over the
whole sequence, although the mask leaves half of it out.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bare import ROOT
from common import describe, header, parse, parser, read_config, table
from ours import engine_step, has_engine, loop_step, random_batches
from roof import gemm_rate
from teams import Result, Side, Step, one_by_one, take_turns

from megatron_lite.config import Config

OURS, PLAIN = "megatron_lite", "plain PyTorch"
DATASHEET = 989e12  # dense bf16 of an H100 or H200 (SXM), FLOP/s


@dataclass(frozen=True)
class Preset:
    """A model: a configuration file and what is changed in it."""

    config: str
    overrides: tuple[str, ...]


def _batch(size: int, *overrides: str) -> tuple[str, ...]:
    return (f"train.micro_batch_size={size}", f"train.global_batch_size={size}", *overrides)


def _model(**keys: object) -> tuple[str, ...]:
    return tuple(f"model.{key}={value}" for key, value in keys.items())


_LLAMA = _model(
    position_embedding="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear="false",
    tie_embeddings="false",
)
# Names in `cuda` are in the order of their worth: a time limit cuts the last ones.
PRESETS = {
    "cpu": {
        # nanoGPT's character model with its published dropout, at a batch for a CPU.
        "shakespeare_char": Preset("configs/shakespeare_char.json", _batch(16, "model.vocab_size=65")),
        "768 wide": Preset(
            "configs/gpt2_125m.json", _batch(2, *_LLAMA, *_model(num_layers=2, vocab_size=50304))
        ),
    },
    "cuda": {
        "GPT 1.3B": Preset("configs/gpt_1.3b.json", _batch(8)),
        "8 blocks of Llama 3 8B": Preset(
            "configs/llama3_8b.json",
            _batch(
                2,
                *_model(num_layers=8, seq_length=4096, vocab_size=32000),
                "parallel.tensor=1",
                "parallel.sequence_parallel=false",
            ),
        ),
        "GPT 350M": Preset(
            "configs/gpt2_125m.json",
            _batch(16, *_model(num_layers=24, hidden_size=1024, num_attention_heads=16)),
        ),
        "GPT 125M": Preset("configs/gpt2_125m.json", _batch(32)),
    },
}


def build_plain(rank: int, store: str, config: Config, device: str, compiled: str) -> Step:
    """One training step of the plain model."""
    from plain_gpt import PlainGPT, PlainTrainer

    torch.manual_seed(config.train.seed)
    with torch.device(device):
        model = PlainGPT(config.model)
    trainer = PlainTrainer(model, config, compiled)
    batches = random_batches(config, device)
    return lambda: trainer.step(batches)


class Comparison:
    """The sides of one model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.engine = has_engine() and not options.loop
        # Block by block on a GPU, where models have many blocks and the whole would take minutes.
        self.compiled = "blocks" if self.device == "cuda" else "model"

    def side(self, name: str, build: object, *args: object) -> Side:
        return Side(name, build, args, self.device, self.options.threads)  # type: ignore[arg-type]

    def ours(self, name: str, config: Config, allocator: bool = True) -> Side:
        kernels = config.kernels.model_copy(update={"cpu_allocator": allocator})
        config = config.model_copy(update={"kernels": kernels})
        if self.engine:
            return self.side(name, engine_step, config, 1, self.device)
        return self.side(f"{name} (no DeepSpeed: plain loop)", loop_step, config, self.device)

    def plain(self, name: str, config: Config, compiled: str = "") -> Side:
        return self.side(name, build_plain, config, self.device, compiled)

    def sides(self, config: Config, fp32: Config) -> tuple[list[Side], list[str]]:
        """What is compared, ours first, and the names of the sides that ratios are to."""
        precision = config.train.precision
        plain = f"{PLAIN}, {precision}"
        made = [self.ours(f"{OURS}, {precision}", config), self.plain(plain, config)]
        baselines = [plain]
        if self.device == "cpu":
            if precision != "fp32":
                baselines.insert(0, f"{PLAIN}, fp32")
                made.append(self.plain(baselines[0], fp32))
            if self.engine:
                made.append(self.ours(f"{OURS}, {precision}, kernels.cpu_allocator=false", config, False))
        if self.options.compile:
            made.append(self.plain(f"{plain}, torch.compile", config, self.compiled))
        return made, baselines


def chosen(options: argparse.Namespace) -> dict[str, Preset]:
    """The models asked for."""
    if options.config is not None:
        return {options.config: Preset(options.config, _batch(16, "model.vocab_size=65"))}
    presets = PRESETS[options.device]
    return {name: presets[name] for name in options.preset or presets}


def main() -> None:
    made = parser(__doc__, rounds=6, steps=2)
    names = [name for presets in PRESETS.values() for name in presets]
    made.add_argument("--preset", action="append", choices=names, help="default: all of the device")
    made.add_argument("--config", metavar="FILE", help="another model, at batch 16")
    made.add_argument(
        "--precision", choices=("fp32", "bf16"), action="append", help="default: both, on a GPU bf16"
    )
    made.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    made.add_argument("--loop", action="store_true", help="ours without DeepSpeed, though it is there")
    options = parse(made)
    how = "one side after the other" if options.device == "cuda" else "alternating"
    print(header(options, f"{options.rounds} rounds of {options.steps} steps a side, {how}"))
    comparison = Comparison(options)
    jobs = []
    for name, preset in chosen(options).items():
        for precision in options.precision or (("bf16",) if options.device == "cuda" else ("fp32", "bf16")):
            config, fp32 = (
                read_config(options, ROOT / preset.config, *preset.overrides, f"train.precision={kind}")
                for kind in (precision, "fp32")
            )
            jobs.append(Job(f"{name}, {precision}", config, *comparison.sides(config, fp32)))
    (on_a_gpu if options.device == "cuda" else on_a_cpu)(options, jobs)


@dataclass(frozen=True)
class Job:
    """One table to be."""

    title: str
    config: Config
    sides: list[Side]
    baselines: list[str]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.global_batch_size * self.config.model.seq_length

    def print(self, results: list[Result], *columns: tuple[str, Callable[[float], str]]) -> None:
        print(f"\n#### {self.title}\n\n{describe(self.config)}\n")
        print(table(results, self.tokens, self.baselines, columns), flush=True)


def on_a_cpu(options: argparse.Namespace, jobs: list[Job]) -> None:
    for job in jobs:
        if time.time() > options.until:
            print(f"\nLeft out, the time being up: {job.title}")
        else:
            job.print(take_turns(job.sides, options.rounds, options.steps))


def on_a_gpu(options: argparse.Namespace, jobs: list[Job]) -> None:
    """All models without torch.compile first, which takes longest: a time limit cuts what comes last."""
    rate = gemm_rate(torch.bfloat16, "cuda")
    torch.cuda.empty_cache()
    print(f"- bf16 matrix product of 8192: {rate / 1e12:.0f} TFLOP/s")
    sides = sorted((side for job in jobs for side in job.sides), key=lambda side: "compile" in side.name)
    results = one_by_one(sides, options.rounds, options.steps, options.until)
    for job in jobs:
        work = job.tokens * job.config.model.flops_per_token()

        def share(of: float, work: float = work) -> Callable[[float], str]:
            return lambda seconds: f"{work / seconds / of:.1%}"

        job.print(
            [result for result in results if any(result.side is side for side in job.sides)],
            ("TFLOP/s", lambda seconds, work=work: f"{work / seconds / 1e12:.0f}"),
            ("MFU of the matrix product", share(rate)),
            ("MFU of 989 TFLOP/s", share(DATASHEET)),
        )


if __name__ == "__main__":
    sys.exit(main())
