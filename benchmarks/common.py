"""What the benchmarks share: options, presets of models, what is said above a table, and tables."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bare import ROOT, settings_are_checked
from teams import Result

from megatron_lite.config import Config, ConfigError, load_config


def parser(doc: str | None, rounds: int, steps: int | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    made.add_argument(
        "--threads", type=int, help="CPU threads of a side; default: OMP_NUM_THREADS, or every core"
    )
    made.add_argument("--rounds", type=int, default=rounds, help="turns of every side (%(default)s)")
    made.add_argument(
        "--until",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="of the epoch: begin nothing after it",
    )
    if steps is not None:
        made.add_argument("--steps", type=int, default=steps, help="steps a turn (%(default)s)")
        made.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; ends the program where the device is not there."""
    options = made.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device on this machine")
    if options.threads is None:
        counted = "OMP_NUM_THREADS" in os.environ
        options.threads = torch.get_num_threads() if counted else len(os.sched_getaffinity(0))
    return options


def read_config(options: argparse.Namespace, file: str | Path, *overrides: str) -> Config:
    """The configuration with the benchmark's own overrides, then the user's. Ends the program if it is wrong."""
    try:
        return load_config(file, [*overrides, *options.overrides])
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def header(options: argparse.Namespace, turns: str) -> str:
    """When, where, on what and how the figures below were measured."""
    names = ("torch", "triton", "deepspeed", "liger_kernel", "flash_attn", "transformer_engine")
    versions = [f"python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    device = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    lines = [
        f"date: {datetime.date.today()}",
        f"machine: {device}, {os.cpu_count()} CPU cores, {options.threads} threads for a side",
        f"versions: {', '.join(versions)}",
        f"turns: {turns}; medians, (least - most)",
        f"command: python {shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}",
    ]
    if not settings_are_checked():
        lines.append("settings: unchecked, pydantic not being installed")
    return "\n".join(f"- {line}" for line in lines)


def describe(config: Config) -> str:
    """A model and its batch in two lines."""
    model, train = config.model, config.train
    return "\n".join(
        (
            f"- model: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
            f"vocabulary {model.padded_vocab_size}, {model.normalization}, {model.activation}, "
            f"dropout {model.hidden_dropout:g}",
            f"- batch: {train.global_batch_size} x {model.seq_length} tokens "
            f"in micro-batches of {train.micro_batch_size}",
        )
    )


def _processor() -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range of some measurements."""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} - {high})"


def table(
    results: Sequence[Result],
    tokens: int,
    baselines: Sequence[str],
    more: Sequence[tuple[str, Callable[[float], str]]] = (),
) -> str:
    """A Markdown table of the sides.

    Args:
        baselines: names of sides; each makes a column of ratios to it, taken within each round.
        more: titles of further columns, and what makes a cell from median seconds a step.
    """
    by_name = {result.side.name: result for result in results}
    ranked = any(result.side.ranks > 1 for result in results)
    titles = ["side", "tokens/s", *(f"speed / {name}" for name in baselines), *(title for title, _ in more)]
    titles.append("peak MiB of a rank" if ranked else "peak MiB")
    rows = [titles, ["---"] * len(titles)]
    for result in results:
        if not result.seconds:
            rows.append([result.side.name, result.error, *[""] * (len(titles) - 2)])
            continue
        row = [result.side.name, spread([tokens / own for own in result.seconds], 0)]
        for name in baselines:
            pairs = zip(by_name[name].seconds, result.seconds, strict=False)
            ratios = [base / own for base, own in pairs]
            row.append(spread(ratios, 3) if ratios else "-")
        row += [cell(statistics.median(result.seconds)) for _, cell in more]
        rows.append([*row, f"{result.peak:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
