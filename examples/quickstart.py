#!/usr/bin/env python3
"""From text to a trained model on any machine, in a few minutes: what `make train` runs.

Every stage is a command you could type; they are printed as they run. The text is Python's own documentation,
which every machine that gets this far has.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/quickstart")
PROMPT = "Return a new"
VOCABULARY = 1024


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def command(*words: str) -> None:
    """Runs one command from the root of the repository; a failure ends everything with its exit status."""
    print(f"$ {' '.join(words)}", flush=True)
    program = [sys.executable] if words[0].endswith(".py") else []
    if words[0] == "deepspeed":  # the launcher that belongs to this environment
        words = (str(Path(sys.executable).with_name("deepspeed")), *words[1:])
    status = subprocess.run([*program, *words], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def write_corpus() -> Path:
    """Python's documentation, cleaned, one JSON object a line."""
    from megatron_lite.corpus.python_docs import write_python_docs

    corpus = ROOT / RUN / "docs.jsonl"
    print(write_python_docs(corpus))
    print(f"{corpus.relative_to(ROOT)}: {corpus.stat().st_size / 1e6:.1f} MB")
    return corpus


def train_tokenizer(corpus: Path) -> None:
    from megatron_lite.tokenizers.train import train_bpe

    with corpus.open(encoding="utf-8") as lines:
        train_bpe((json.loads(line)["text"] for line in lines), VOCABULARY, ROOT / RUN / "tokenizer.json")
    print(f"{RUN}/tokenizer.json: {VOCABULARY} tokens")


def layout(gpus: int) -> tuple[int, list[str]]:
    """Ranks and settings: 8 on CPUs (tensor 2 x pipeline 2 x data 2); on GPUs as many of these as there are."""
    if not gpus or gpus >= 8:
        return 8, []
    tensor, pipeline = (2 if gpus >= 2 else 1), (2 if gpus >= 4 else 1)
    return min(gpus, 4) // 2 * 2 or 1, [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="passed on to the training run"
    )
    arguments = parser.parse_args()
    begin = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # eight ranks share the cores

    step("1/5 text: the documentation of Python's standard library")
    shutil.rmtree(ROOT / RUN, ignore_errors=True)
    corpus = write_corpus()

    step("2/5 tokenizer: byte-level BPE")
    train_tokenizer(corpus)

    step("3/5 tokens: an indexed dataset")
    prefix, tokenizer = str(RUN / "docs"), f"hf:{RUN}/tokenizer.json"
    command(
        "tools/preprocess_data.py", "--input", str(RUN / "docs.jsonl"), "--output-prefix", prefix,
        "--tokenizer", tokenizer, "--append-eod", "--workers", "2",
    )  # fmt: skip

    step("4/5 training: tensor, pipeline and ZeRO data parallelism")
    import torch

    gpus = torch.cuda.device_count()
    ranks, settings = layout(gpus)
    sets = [word for setting in (*settings, *arguments.set) for word in ("--set", setting)]
    command(
        "deepspeed",
        "--num_accelerators",
        str(ranks),
        "pretrain_gpt.py",
        "--config",
        "configs/quickstart.json",
        *sets,
    )

    step("5/5 the same checkpoint in one process: validation loss and a sample")
    command("tools/evaluate.py", "--load", str(RUN))
    command(
        "tools/generate.py", "--load", str(RUN), "--prompt", PROMPT, "--max-new-tokens", "100",
        "--temperature", "0.8", "--top-k", "40", "--seed", "1", "--num-samples", "3",
    )  # fmt: skip
    print(f"\ndone in {time.monotonic() - begin:.0f} s; the run is in {RUN}")


if __name__ == "__main__":
    main()
