"""The main job's command line on forked ranks: what a user types, without waiting for a launcher."""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

import pretrain_gpt
from megatron_lite.data import IndexedDatasetWriter
from megatron_lite.tokenizers import load_tokenizer
from tests.distributed import run_ranks
from tests.training_case import import_what_ranks_import

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs/tiny.json")
# Of each row, what another run of the same steps repeats to the last bit.
REPEATABLE = ("step", "loss", "grad_norm", "lr", "tokens", "valid_loss", "test_loss")


@dataclass
class Result:
    """How one rank's command ended."""

    status: int
    out: str
    err: str


def write_bytes(folder: Path) -> str:
    """The licence's paragraphs as byte tokens, one document each; returns the prefix."""
    tokenizer = load_tokenizer("byte")
    with IndexedDatasetWriter(folder / "bytes", np.uint16) as writer:
        for paragraph in (ROOT / "LICENSE").read_text().split("\n\n"):
            writer.add_sequence(np.array([*tokenizer.encode(paragraph), tokenizer.eod_id]))
            writer.end_document()
    return str(folder / "bytes")


def words(prefix: str, output: Path | str, *settings: str, config: str = TINY) -> list[str]:
    """The arguments of a run of configs/tiny.json made smaller still; later settings win over earlier ones."""
    small = (
        f"data.train={prefix}",
        f"train.output_dir={output}",
        "model.seq_length=32",
        "model.hidden_size=32",
    )
    few = ("train.global_batch_size=8", "train.device=cpu", "optimizer.warmup_steps=0")
    sets = [word for setting in (*small, *few, *settings) for word in ("--set", setting)]
    return ["--config", config, *sets]


def run_command(
    arguments: list[str], ranks: int = 1, first: Callable[[], Any] = lambda: None
) -> list[Result]:
    """Runs pretrain_gpt.main on forked ranks; `first` is called on each of them before."""
    import_what_ranks_import()
    return run_ranks(ranks, _command, arguments, first)


def _command(arguments: list[str], first: Callable[[], Any]) -> Result:
    logging.root.handlers.clear()  # pytest's
    sys.argv = ["pretrain_gpt.py", f"--local_rank={dist.get_rank()}", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        first()
        status = pretrain_gpt.main()
    return Result(status, out.getvalue(), err.getvalue())


def rows(output: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def repeatable(output: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [{key: row[key] for key in REPEATABLE if key in row} for row in rows(output)]
