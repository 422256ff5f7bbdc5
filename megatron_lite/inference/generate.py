"""Generation: a batch of prompts of any lengths, continued token by token with a key/value cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.inference.sampling import Sampling
from megatron_lite.model.cache import KVCache
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.collectives import all_gather

PADDING = -1  # segment of the tokens that fill up a row at its left


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
    eod_id: int | None = None,
    vocab_size: int | None = None,
    first_row: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt; a row is what it would be alone, whatever the other rows are.

    A row ends after `max_new_tokens`, at an end-of-document token, or when prompt and continuation fill the model's
    learned positions (rotary models have no such limit, but are best within the length they were trained on). Under
    tensor parallelism every tensor rank calls it with the same arguments, and has the same result.

    Args:
        prompts: token ids, at least one each.
        temperature, top_k, top_p, seed: see `Sampling`; temperature 0 is greedy.
        eod_id: the token that ends a row; None: none does.
        vocab_size: only ids below it are drawn; None: the model's, without its padding.
        first_row: number of the first row, where a batch is divided over several calls: a row's draws follow from
            the seed and its number.
        on_token: called with (row, token) as each token is known.

    Returns:
        The new tokens of each row, without prompt and end-of-document token.

    Raises:
        ValueError: a prompt or setting cannot be used, on every rank.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    limits = check_prompts(model.config, prompts, max_new_tokens, vocab_size)
    if model.runtime.mesh.sequence_parallel:
        raise ValueError(
            "a sequence of one token cannot be divided: load the model without sequence_parallel"
        )
    if not prompts:
        return []
    rows = _Rows.of(model, prompts, steps=max(limits))
    draws = sampling.draws(first_row, len(prompts), max(limits))
    out: list[list[int]] = [[] for _ in prompts]
    active = set(range(len(prompts)))
    tokens = rows.prompts
    with _inference(model):
        for step in range(max(limits)):
            logits = rows.next_logits(tokens, vocab_size)
            chosen = _agree(model, sampling.choose(logits, draws[:, step]))
            for row, token in enumerate(chosen.tolist()):
                if row not in active:
                    continue
                if token == eod_id:
                    active.discard(row)
                    continue
                out[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if len(out[row]) == limits[row]:
                    active.discard(row)
            if not active:
                break
            tokens = chosen.unsqueeze(1)
    return out


def check_prompts(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> list[int]:
    """The largest number of new tokens of each prompt.

    Raises:
        ValueError: a prompt is empty, holds ids outside the vocabulary, or leaves no room for a token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    known = _vocab_size(config, vocab_size)
    positions = config.max_positions if config.position_embedding == "learned_absolute" else None
    limits = []
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {number} is empty; give at least one token, such as the end-of-document one"
            )
        if not 0 <= min(prompt) <= max(prompt) < known:
            worst = max(prompt) if max(prompt) >= known else min(prompt)
            raise ValueError(f"prompt {number} holds id {worst}, and the model knows 0 to {known - 1}")
        limit = max_new_tokens
        if positions is not None:
            if len(prompt) >= positions:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, but the model has {positions} learned positions: "
                    f"give at most {positions - 1}"
                )
            limit = min(limit, positions - len(prompt))
        limits.append(limit)
    return limits


def _vocab_size(config: ModelConfig, vocab_size: int | None) -> int:
    assert config.vocab_size is not None
    return min(vocab_size or config.vocab_size, config.vocab_size)


@dataclass
class _Rows:
    """A batch under way: rows padded at the left to one length, so that all end, and go on, at the same place.

    Attributes:
        prompts: [b, s] token ids.
        padding: [b, 1] tokens at the left of each row that are not its own.
    """

    model: GPT
    prompts: Tensor
    padding: Tensor
    cache: KVCache

    @classmethod
    def of(cls, model: GPT, prompts: Sequence[Sequence[int]], steps: int) -> "_Rows":
        device, width = model.runtime.device, max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        padding = torch.tensor([[width - len(p)] for p in prompts], device=device)
        capacity = width + steps - 1  # the last token drawn is never fed back
        segments = None
        if any(len(p) < width for p in prompts):
            segments = torch.where(torch.arange(capacity, device=device) < padding, PADDING, 0)
        cache = KVCache(model.config, model.runtime, len(prompts), capacity, segments)
        return cls(model, tokens, padding, cache)

    def next_logits(self, tokens: Tensor, vocab_size: int | None) -> Tensor:
        """Feeds the next tokens, [b, s], and returns the logits [b, V] of what follows, on every rank alike."""
        config, runtime, cache = self.model.config, self.model.runtime, self.cache
        cache.begin(tokens.size(1))
        places = torch.arange(cache.length, cache.length + tokens.size(1), device=runtime.device)
        positions = (places - self.padding).clamp(min=0)
        if config.position_embedding == "learned_absolute":
            # A row that has ended goes along until the last one has; where it is no longer matters.
            positions = positions.clamp(max=config.max_positions - 1)
        context = runtime.context(positions, cache.new_segments, cache)
        logits: Tensor = self.model(tokens, context)[:, -1]
        cache.end()
        if runtime.mesh.tensor_size > 1:
            logits = all_gather(logits, runtime.mesh, dim=1)
        return logits[:, : _vocab_size(config, vocab_size)]


def _agree(model: GPT, tokens: Tensor) -> Tensor:
    """The first tensor rank's choice, on every tensor rank.

    They have the same logits and draws; but sums that one GPU rounds otherwise would set them apart for good.
    """
    mesh = model.runtime.mesh
    if mesh.tensor_size > 1:
        tokens = tokens.contiguous()
        dist.broadcast(tokens, group=mesh.tensor_group, group_src=0)
    return tokens


@contextmanager
def _inference(model: GPT) -> Iterator[None]:
    """Evaluation mode, and logits of the last position only: a prompt's others would fill b x s x V numbers."""

    def last_position(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        return hidden[:, -1:], *others

    training = model.training
    model.eval()
    hook = model.norm.register_forward_pre_hook(last_position)
    try:
        yield
    finally:
        hook.remove()
        model.train(training)
