#!/usr/bin/env python3
"""Say what this machine is, which kernels it can use for each operation, and why not the rest.

    python tools/doctor.py [--config configs/gpt_1.3b.json] [--device cpu] [--json]

What is listed first is what `auto` prefers. Heads, dropout and documents are those of the configuration; without one:
heads 64 wide, attention without dropout or documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from megatron_lite.command import command
from megatron_lite.config import load_config
from megatron_lite.ops import Needs
from megatron_lite.ops.report import machine, survey


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="a run to look at it for")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="%(default)s")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    options = parser.parse_args(arguments)
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no CUDA device on this machine")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    needs = Needs.on(device, torch.float32)
    if options.config is not None:
        needs = Needs.of(load_config(options.config), device, torch.float32)
    about, found = machine(), survey(needs)
    if options.json:
        print(json.dumps({"machine": about, "device": device.type, "operations": found}, indent=2))
    else:
        show(about, found, device.type)
    return 0


def show(about: dict[str, str], found: dict[str, Any], device: str) -> None:
    for name, text in about.items():
        print(f"{name:9}  {text}")
    for group, answers in found.items():
        auto = ", ".join(f"{dtype} {name}" for dtype, name in answers["auto"].items())
        print(f"\n{group} on {device}; auto takes: {auto}")
        for name, reasons in answers["why_not"].items():
            print(f"  {name:18}  {verdict(reasons)}")


def verdict(reasons: dict[str, str | None]) -> str:
    """One line on a backend, from the reason against each type."""
    good = [dtype for dtype, reason in reasons.items() if reason is None]
    if len(good) == len(reasons):
        return "yes"
    if not good:
        # What stands against it whatever the type; where nothing does, what stands against bf16.
        each = [str(reason).split("; ") for reason in reasons.values()]
        always = [part for part in each[0] if all(part in parts for parts in each)]
        return f"no: {'; '.join(always) or reasons['bf16']}"
    bad = {dtype: reason for dtype, reason in reasons.items() if reason is not None}
    return f"{', '.join(good)}; not {' and '.join(bad)}: {next(iter(bad.values()))}"


if __name__ == "__main__":
    sys.exit(main())
