"""The mean loss of a model over batches."""

import math

import numpy as np
import pytest
import torch

from megatron_lite.data.gpt import SampleDataset
from megatron_lite.data.loader import DataLoader
from megatron_lite.inference.evaluate import mean_loss
from tests.inference.case import make_config, make_model

LENGTH = 32


class Rows(SampleDataset):
    """Samples of random tokens, with ends of documents (token 0)."""

    def __init__(self, count: int) -> None:
        self.rows = np.random.default_rng(3).integers(0, 61, (count, LENGTH + 1))
        self.rows[:, 5] = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, samples: range) -> np.ndarray:  # type: ignore[override]
        return self.rows[samples.start : samples.stop]


def loader(count: int) -> DataLoader:
    return DataLoader(Rows(count), 2, 4, eod_id=0, eod_mask_loss=True, vocab_size=61, num_workers=0)


@torch.no_grad()
def expected(model: torch.nn.Module, rows: np.ndarray) -> tuple[float, int]:
    """By torch's cross entropy, in one batch: no loss where the input is token 0."""
    tokens = torch.from_numpy(rows)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        model(inputs)[..., :61].flatten(0, 1).double(), labels.flatten(), reduction="none"
    )
    kept = inputs.flatten() != 0
    return float(losses[kept].mean()), int(kept.sum())


def test_mean_over_unmasked_tokens() -> None:
    model = make_model(make_config("llama"))
    for samples, steps, used in ((8, 10, 8), (8, 1, 4), (11, 10, 8)):
        loss, tokens = mean_loss(model, loader(samples), steps)
        reference, count = expected(model, Rows(samples).rows[:used])
        assert tokens == count < used * LENGTH
        assert loss == pytest.approx(reference, abs=1e-5)
        assert loss > math.log(61) - 1


def test_less_than_a_batch_is_an_error_not_a_loss_of_zero() -> None:
    with pytest.raises(ValueError, match="the data hold 3 samples, no whole batch"):
        mean_loss(make_model(make_config("gpt2")), loader(3), 1)
