"""Drawing tokens: the distribution is the one asked for, to the edges of top-k and top-p."""

import pytest
import torch
from torch import Tensor

from megatron_lite.inference.sampling import Sampling

DRAWS = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # evenly over [0, 1)
PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBABILITIES.log() + 3.0


def shares(sampling: Sampling, logits: Tensor = LOGITS) -> Tensor:
    """How often each token is chosen."""
    chosen = sampling.choose(logits.expand(len(DRAWS), -1), DRAWS)
    return torch.bincount(chosen, minlength=logits.numel()) / len(DRAWS)


def check(sampling: Sampling, *expected: float) -> None:
    torch.testing.assert_close(
        shares(sampling), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-4
    )


def test_plain_sampling_follows_the_softmax() -> None:
    check(Sampling(), *PROBABILITIES.tolist())


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        check(Sampling(temperature), *(expected / expected.sum()).tolist())
    check(Sampling(temperature=0), 0, 1, 0, 0, 0)
    check(Sampling(temperature=1e-300), 0, 1, 0, 0, 0)


def test_top_k_keeps_k() -> None:
    check(Sampling(top_k=1), 0, 1, 0, 0, 0)
    check(Sampling(top_k=2), 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0)
    for k in (0, 5, 100):
        check(Sampling(top_k=k), *PROBABILITIES.tolist())


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    check(Sampling(top_p=1e-9), 0, 1, 0, 0, 0)
    check(Sampling(top_p=0.39), 0, 1, 0, 0, 0)
    check(Sampling(top_p=0.41), 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0)
    check(Sampling(top_p=0.66), 0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85)
    check(Sampling(top_p=1.0), *PROBABILITIES.tolist())


def test_top_p_counts_what_top_k_left() -> None:
    # Of the three most likely, 0.4 / 0.85 = 0.47: two of them reach 0.5, where alone 0.4 + 0.25 would as well;
    # 0.75 is reached by two of three (0.765), but by three of five.
    check(Sampling(top_k=3, top_p=0.75), 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0)
    check(Sampling(top_p=0.75), 0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85)
    check(Sampling(top_k=2, top_p=0.99), 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0)


def test_temperature_comes_before_top_p() -> None:
    # At 0.5 the squares count: 0.16 of 0.265 = 0.60 alone reaches 0.55, which 0.4 does not.
    check(Sampling(temperature=0.5, top_p=0.55), 0, 1, 0, 0, 0)


def test_the_lowest_of_equal_tokens_is_kept() -> None:
    assert shares(Sampling(top_k=2), torch.zeros(6)).tolist() == [0.5, 0.5, 0, 0, 0, 0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    highest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for draw in (torch.zeros(1, dtype=torch.float64), highest):
        assert Sampling().choose(logits.unsqueeze(0), draw).tolist() == [1]


def test_draws_are_uniform_and_of_each_row_its_own() -> None:
    sampling = Sampling(seed=9)
    draws = sampling.draws(0, 4, 5000)
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(dim=1) - 0.5).abs().max() < 0.03
    assert torch.corrcoef(draws).triu(1).abs().max() < 0.06
    assert torch.equal(sampling.draws(2, 1, 7)[0], draws[2, :7])
    # The rows of another seed are not those of this one, moved by some.
    assert not set(Sampling(seed=10).draws(0, 4, 1).flatten().tolist()) & set(draws[:, 0].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
