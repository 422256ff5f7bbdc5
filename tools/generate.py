"""Continue prompts with the model of a checkpoint that any layout wrote.

Prompts come from --prompt, from the lines of --prompt-file, or else from the lines of standard input, answered one
by one. Text goes to standard output, everything else to standard error. The checkpoint is read through before, and
where the newest of a run is damaged, the one before it is used, with a warning.
One process, or the ranks of a launcher:

    python tools/generate.py --load runs/example --prompt "Once upon a time"
    torchrun --nproc-per-node 2 tools/generate.py --load runs/example --tensor 2 --prompt "Once upon a time"

Exit status: 0 done, 2 bad input or settings.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import DamagedCheckpoint, Reader, search
from megatron_lite.inference import check_prompts, generate, load_model, open_tokenizer, read_config
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import DTYPES
from megatron_lite.parallel.launch import Launch, choose_device, detect_launch, init_distributed
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.tokenizers import Tokenizer

log = logging.getLogger("generate")

SEPARATOR = "-" * 40
# A rank waits in a collective while somebody thinks about the next line.
TIMEOUT_MINUTES, INTERACTIVE_TIMEOUT_MINUTES = 10, 7 * 24 * 60

T = TypeVar("T")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        launch = detect_launch()
    except ValueError as error:
        return fail(str(error))
    logging.basicConfig(
        level=logging.INFO if launch.is_first else logging.ERROR, format="%(message)s", stream=sys.stderr
    )
    if launch.world_size != options.tensor:
        ranks = "1 rank was" if launch.world_size == 1 else f"{launch.world_size} ranks were"
        problem = f"{ranks} started, and --tensor is {options.tensor}: give --tensor {launch.world_size}, or "
        problem += f"start {options.tensor}"
        return fail(problem) if launch.is_first else 2
    interactive = options.prompt is None and options.prompt_file is None
    joined = launch.world_size > 1 and not dist.is_initialized()
    try:
        device = choose_device(options.device, launch)
        if joined:
            init_distributed(launch, device, INTERACTIVE_TIMEOUT_MINUTES if interactive else TIMEOUT_MINUTES)
        mesh = build_mesh(options.tensor) if launch.world_size > 1 else Mesh()
        folder = find_checkpoint(options, launch)
        session = together(launch, lambda: Session.open(folder, options, launch, device, mesh))
        if interactive:
            session.converse()
        else:
            session.answer(together(launch, lambda: session.encode(read_prompts(options))))
    except Refused as error:
        return fail(str(error)) if launch.is_first else 2
    except (ValueError, OSError) as error:
        return fail(str(error) if launch.world_size == 1 else f"rank {launch.rank}: {error}")
    except KeyboardInterrupt:
        return 130
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR",
        help="a run's output folder, one of its checkpoints, or its weights folder",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; empty lines are left out")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0: the most likely token each time (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K most likely; 0: all"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the most likely that sum to P"
    )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows at once; changes no text (%(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="SPEC", help="instead of the one the model was trained with")
    parser.add_argument("--no-check", action="store_true", help="do not verify the checkpoint's checksums")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="the one trained in on a GPU, fp32 on a CPU")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="ranks that share the model")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    options = parser.parse_args(arguments)
    for name in ("max_new_tokens", "num_samples", "batch_size", "tensor"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if not 0 <= options.temperature < float("inf"):
        parser.error("--temperature is 0 or more")
    if options.top_k < 0:
        parser.error("--top-k is 0 or more")
    if not 0 < options.top_p <= 1:
        parser.error("--top-p is more than 0 and at most 1")
    return options


def fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


class Refused(ValueError):
    """Raised on every rank alike, so that one of them tells it."""


def gather(launch: Launch, value: object) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    values = [value] * launch.world_size
    if launch.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def together(launch: Launch, action: Callable[[], T]) -> T:
    """Does something on every rank; where it fails on any, raises Refused on all, none left waiting."""
    result, fault = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        fault = str(error)
    if found := [fault for fault in gather(launch, fault) if fault is not None]:
        raise Refused(found[0])
    return result  # type: ignore[return-value]


def find_checkpoint(options: argparse.Namespace, launch: Launch) -> Path:
    """The step folder that --load means, the same on every rank; each has read its share of the weights through.

    Raises Refused where there is none, or none that is whole.
    """
    candidates, fault = search(options.load), None
    while True:
        found = [together(launch, lambda: candidates.send(fault) if launch.is_first else None)]  # noqa: B023
        if launch.world_size > 1:
            dist.broadcast_object_list(found)
        (folder,) = found
        assert folder is not None, "the first rank found one or raised"
        if options.no_check:
            return folder
        with together(launch, lambda: Reader(folder)) as reader:  # noqa: B023
            try:
                together_with = partial(gather, launch)
                reader.verify("weight", rank=launch.rank, world_size=launch.world_size, gather=together_with)
            except DamagedCheckpoint as error:
                fault = str(error)
            else:
                return folder


def read_prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        return list(options.prompt)
    try:
        with open(options.prompt_file, encoding="utf-8") as file:
            prompts = [line.rstrip("\r\n") for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompt_file}: not UTF-8 text: {error.reason}") from None
    if not prompts:
        raise ValueError(f"{options.prompt_file}: no prompts in it")
    return prompts


@dataclass(frozen=True)
class Session:
    """A loaded model and how to sample from it, on one rank."""

    model: GPT
    tokenizer: Tokenizer
    launch: Launch
    options: argparse.Namespace

    @classmethod
    def open(
        cls,
        folder: Path,
        options: argparse.Namespace,
        launch: Launch,
        device: torch.device,
        mesh: Mesh,
    ) -> Session:
        """Raises ValueError (or one of its kinds) for a checkpoint or tokenizer that cannot be used."""
        with Reader(folder) as reader:
            config = read_config(reader, options.tensor)
            tokenizer, known = open_tokenizer(config, options.tokenizer), config.model.vocab_size
            if tokenizer is None:
                raise ValueError(f"{reader.path}: trained without a tokenizer; give --tokenizer")
            if known is not None and tokenizer.vocab_size > known:
                # Not an error: some models come with tokens that are in the tokenizer alone, and are never drawn.
                log.warning(
                    "tokenizer %s has %d ids and the model %d: is it the one the model was trained with?",
                    *(tokenizer.name, tokenizer.vocab_size, known),
                )
            name = options.dtype or (config.train.precision if device.type == "cuda" else "fp32")
            model = load_model(reader, config, mesh=mesh, dtype=DTYPES[name], device=device)
            count = config.model.parameter_count() / 1e6
            log.info(
                "%s: step %d, %.1fM parameters, %s on %s, tokenizer %s",
                *(reader.path, reader.step, count, name, device, tokenizer.name),
            )
        return cls(model, tokenizer, launch, options)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt; an empty one stands for the start of a document.

        Raises ValueError for a prompt that is too long, not UTF-8, or made of tokens the model does not have.
        """
        for prompt in prompts:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what Python makes of other bytes
                raise ValueError(f"the prompt {prompt[:40]!r} is not UTF-8 text")
        rows = self.tokenizer.encode_batch(prompts)
        if self.tokenizer.eod_id is not None:
            rows = [row or [self.tokenizer.eod_id] for row in rows]
        check_prompts(self.model.config, rows, self.options.max_new_tokens)
        return rows

    def answer(self, prompts: list[list[int]]) -> None:
        """Prints the continuations of each prompt, in order, a line of dashes between two texts."""
        options, started, count = self.options, time.perf_counter(), 0
        rows = [prompt for prompt in prompts for _ in range(options.num_samples)]
        for first in range(0, len(rows), options.batch_size):
            batch = rows[first : first + options.batch_size]
            printer = Printer(self, batch[0]) if len(rows) == 1 else None
            new = generate(
                self.model,
                batch,
                options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=options.seed,
                eod_id=self.tokenizer.eod_id,
                vocab_size=self.tokenizer.vocab_size,
                first_row=first,
                on_token=printer.add if printer else None,
            )
            count += sum(map(len, new))
            if printer:
                printer.end()
                continue
            for number, (prompt, tokens) in enumerate(zip(batch, new, strict=True), first):
                self.print(SEPARATOR + "\n" if number else "")
                self.print(self.text(prompt + tokens) + "\n")
        seconds = max(time.perf_counter() - started, 1e-9)
        log.info("%d tokens in %.1f s: %.1f tokens/s", count, seconds, count / seconds)

    def converse(self) -> None:
        """Answers the lines of standard input; a line that cannot be used is told, and the next one awaited."""
        for line in self.lines():
            try:
                self.answer(self.encode([line]))
            except ValueError as error:
                if self.launch.is_first:
                    fail(str(error))

    def lines(self) -> Iterator[str]:
        """The lines that the first rank reads, on every rank."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line of other bytes is for `encode` to refuse
        while True:
            line: list[Any] = [None]
            if self.launch.is_first:
                if sys.stdin.isatty():
                    print("> ", end="", file=sys.stderr, flush=True)
                line[0] = sys.stdin.readline()
            if self.launch.world_size > 1:
                dist.broadcast_object_list(line)
            if not line[0]:
                return
            yield line[0].rstrip("\r\n")

    def text(self, tokens: list[int]) -> str:
        """A document's text, without the token that stands for its start."""
        start = 1 if tokens and tokens[0] == self.tokenizer.eod_id else 0
        return self.tokenizer.decode(tokens[start:])

    def print(self, text: str) -> None:
        if self.launch.is_first:
            print(text, end="", flush=True)


class Printer:
    """Prints one text while it is generated, each part as soon as later tokens cannot change it."""

    def __init__(self, session: Session, prompt: list[int]) -> None:
        self.session, self.tokens, self.printed = session, list(prompt), 0

    def add(self, _row: int, token: int) -> None:
        self.tokens.append(token)
        text = self.session.text(self.tokens)
        # A character whose bytes are not all there yet is shown as U+FFFD, and becomes another with the next token.
        self.show(text.rstrip("\ufffd"))

    def show(self, text: str) -> None:
        self.session.print(text[self.printed :])
        self.printed = max(self.printed, len(text))

    def end(self) -> None:
        self.show(self.session.text(self.tokens))
        self.session.print("\n")


if __name__ == "__main__":
    sys.exit(main())
