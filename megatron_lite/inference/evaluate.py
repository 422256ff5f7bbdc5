"""The loss of a loaded model on held-out data, as the training run reports it."""

import torch

from megatron_lite.data.loader import DataLoader
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.loss import vocab_parallel_cross_entropy


@torch.no_grad()
def mean_loss(model: GPT, loader: DataLoader, steps: int) -> tuple[float, int]:
    """Mean negative log likelihood, in nats, of the unmasked tokens of the next `steps` global batches.

    Fewer batches where the loader has fewer.

    Returns:
        The mean, and the number of tokens it is over.

    Raises:
        ValueError: there is no such token, as in data of less than one global batch.
    """
    runtime, vocab_size = model.runtime, model.config.vocab_size
    assert vocab_size is not None
    total, count = 0.0, 0.0
    for _ in range(min(steps, loader.remaining_steps)):
        for batch in loader.next_step():
            tokens, labels, mask = (
                torch.from_numpy(array).to(runtime.device)
                for array in (batch.tokens, batch.labels, batch.loss_mask)
            )
            positions, segments = (
                None if array is None else torch.from_numpy(array).to(runtime.device)
                for array in (batch.position_ids, batch.segments)
            )
            logits = model(tokens, runtime.context(positions, segments))
            losses = vocab_parallel_cross_entropy(logits, labels, runtime.mesh, vocab_size, runtime.ops)
            total += float((losses * mask).sum(dtype=torch.float64))
            count += float(mask.sum(dtype=torch.float64))
    if count == 0:
        raise ValueError(
            f"nothing to evaluate: the data hold {len(loader.dataset):,} samples, no whole batch"
        )
    return total / count, int(count)
