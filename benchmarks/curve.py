"""Whether our step in bf16 learns what it learns in fp32, and what plain PyTorch learns: loss curves side by side.

nanoGPT's character model (configs/shakespeare_char.json) at a batch of 16 with its published dropout, on the same
batches and from the same weights. Ours draws the same dropout masks in both precisions; plain PyTorch draws others, so
that its curve differs by chance as well. Exit status 1: bf16 is further from fp32 than the limit. Without --text the
text is the documentation inside Python's standard library.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from bare import ROOT
from common import describe, header, parse, parser, read_config
from torch import Tensor

from megatron_lite.config import Config

OVERRIDES = ("train.micro_batch_size=16", "train.global_batch_size=16")
OURS, PLAIN = "megatron_lite", "plain PyTorch"


def read_text(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    import sysconfig

    from megatron_lite.corpus.python_docs import python_docs

    return "\n\n".join(text for _, text in python_docs(Path(sysconfig.get_paths()["stdlib"])))[:2_000_000]


def draw(tokens: Tensor, config: Config, steps: int) -> list[tuple[Tensor, Tensor]]:
    """A batch of random windows for each step: tokens and labels [b, s]."""
    length, size = config.model.seq_length, config.train.global_batch_size
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - length, (steps, size, 1), generator=generator)
    rows = tokens[starts + torch.arange(length + 1)]
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def train(
    kind: str, config: Config, batches: list[tuple[Tensor, Tensor]], device: str, threads: int
) -> tuple[list[float], float]:
    """Loss of each step, and seconds; in a process of its own."""
    from megatron_lite.training.schedule import learning_rate

    step = (ours if kind == OURS else plain)(config, device)
    torch.set_num_threads(threads)
    begun, losses = time.perf_counter(), []
    for number, batch in enumerate(batches):
        losses.append(step(batch, number, learning_rate(config, number)))
        if number % 20 == 19:
            print(
                f"{kind}, {config.train.precision}: step {number + 1}, loss {losses[-1]:.3f}", file=sys.stderr
            )
    return losses, time.perf_counter() - begun


Step = Callable[[tuple[Tensor, Tensor], int, float], float]


def ours(config: Config, device: str) -> Step:
    from ours import as_batches, make_engine

    engine = make_engine(0, "", config, 1, device)

    def step(batch: tuple[Tensor, Tensor], number: int, rate: float) -> float:
        engine.set_learning_rate(rate)
        return float(engine.train_step(as_batches([batch]), number).loss)

    return step


def plain(config: Config, device: str) -> Step:
    from ours import make_runtime
    from plain_gpt import PlainGPT, PlainTrainer, take_weights

    from megatron_lite.model.gpt import GPT
    from megatron_lite.parallel.mesh import Mesh

    torch.manual_seed(config.train.seed)
    model = PlainGPT(config.model)
    source = GPT(config.model, make_runtime(config, torch.device("cpu"), Mesh()))
    take_weights(model, dict(source.named_parameters()), config.model)
    trainer = PlainTrainer(model.to(device), config)

    def step(batch: tuple[Tensor, Tensor], number: int, rate: float) -> float:
        return float(trainer.step([(batch[0].to(device), batch[1].to(device))], rate)[0])

    return step


def smooth(losses: list[float], window: int) -> list[float]:
    """The mean of each `window` successive losses (fewer at the start)."""
    return [statistics.fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]


def largest_difference(a: list[float], b: list[float], window: int) -> float:
    """Of the smoothed curves, relative to `b`, where a whole window lies behind."""
    pairs = list(zip(smooth(a, window), smooth(b, window), strict=True))[window - 1 :]
    return max(abs(x - y) / y for x, y in pairs)


def main() -> int:
    made = parser(__doc__, rounds=1, steps=200)
    made.add_argument("--text", metavar="FILE", help="what is learnt, UTF-8")
    made.add_argument("--window", type=int, default=20, help="steps that are averaged (%(default)s)")
    made.add_argument("--limit", type=float, default=0.01, help="of bf16 from fp32, relative (%(default)s)")
    made.add_argument("--no-plain", dest="plain", action="store_false", help="without plain PyTorch")
    options = parse(made)
    text = read_text(options.text)
    characters = sorted(set(text))
    vocabulary = f"model.vocab_size={len(characters)}"
    ids = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([ids[character] for character in text])
    runs = [(OURS, "fp32"), (OURS, "bf16"), *([(PLAIN, "fp32")] if options.plain else [])]
    file = ROOT / "configs/shakespeare_char.json"
    configs = {
        kind: read_config(options, file, *OVERRIDES, vocabulary, f"train.precision={kind}")
        for kind in ("fp32", "bf16")
    }
    batches = draw(tokens, configs["fp32"], options.steps)
    curves, seconds = [], []
    for kind, precision in runs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
            job = pool.submit(train, kind, configs[precision], batches, options.device, options.threads)
            losses, spent = job.result()
        curves.append(losses)
        seconds.append(spent)
    print(header(options, f"{options.steps} steps, one run after the other"))
    print(describe(configs["fp32"]))
    print(
        f"- text: {len(text):,} characters, {len(characters)} different; {Path(options.text or 'python').name}"
    )
    print(f"- smoothing: the mean of {options.window} steps\n")
    names = [f"{kind}, {precision}" for kind, precision in runs]
    print(f"| step | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    smoothed = [smooth(curve, options.window) for curve in curves]
    for number in range(options.window, options.steps + 1, options.window):
        print(f"| {number} | {' | '.join(f'{curve[number - 1]:.4f}' for curve in smoothed)} |")
    print(f"| seconds | {' | '.join(f'{spent:.0f}' for spent in seconds)} |\n")
    differences = [largest_difference(curves[1], curves[0], options.window)]
    print(f"- largest difference of {names[1]} from {names[0]}: {differences[0]:.2%}")
    for number in range(2 if options.plain else 0):
        apart = largest_difference(curves[number], curves[2], options.window)
        print(f"- largest difference of {names[number]} from {names[2]}: {apart:.2%}")
    return int(differences[0] > options.limit)


if __name__ == "__main__":
    sys.exit(main())
