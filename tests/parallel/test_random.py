"""Dropout masks: what they are, and that no layout and no recomputation changes them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.ops import Ops, ProbabilityDropout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.random import dropout, place_seed
from tests.training_case import Case

SHAPE = (4, 8, 12)


def drop(x: Tensor, seed: int = 1, mesh: Mesh | None = None, *, sharded: bool = False) -> Tensor:
    return dropout(x, 0.25, seed, mesh or Mesh(), Ops(), sharded=sharded)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_rate_and_scale(p: float) -> None:
    values = dropout(torch.ones(400, 500), p, 1, Mesh(), Ops())
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    assert (values == 0).float().mean().item() == pytest.approx(p, abs=0.005)
    assert values.mean().item() == pytest.approx(1, abs=0.02 / (1 - p))


def test_product_and_gradient() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    y, mask = drop(x), drop(torch.ones(SHAPE))
    y.sum().backward()
    assert torch.equal(y, x * mask) and x.grad is not None
    assert torch.equal(x.grad, mask)
    assert drop(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_ranks_hold_parts_of_one_mask(size: int) -> None:
    x = torch.randn(SHAPE)
    meshes = [Mesh(rank=rank, tensor_size=size) for rank in range(size)]
    parts = [drop(part, mesh=mesh, sharded=True) for part, mesh in zip(x.chunk(size, 1), meshes, strict=True)]
    assert torch.equal(torch.cat(parts, 1), drop(x))
    ones = [drop(torch.ones(part.shape), mesh=m, sharded=True) for part, m in zip(parts, meshes, strict=True)]
    assert not torch.equal(ones[0], ones[1])
    assert all(torch.equal(drop(x, mesh=mesh), drop(x)) for mesh in meshes), "replicated"


def test_seed_decides_and_no_generator_of_torch_is_used() -> None:
    x, state = torch.ones(SHAPE), torch.get_rng_state()
    assert torch.equal(drop(x), drop(x))
    assert not torch.equal(drop(x), drop(x, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def dropped(runtime: Runtime, step: int = 0, micro_batch: int = 0) -> int:
    runtime.clock.step, runtime.clock.micro_batch = step, micro_batch
    return runtime.context().dropout_seed


def test_masks_differ_by_run_step_micro_batch_and_place() -> None:
    seeds = [
        dropped(Runtime(seed=seed), step, micro)
        for seed, step, micro in [
            (1, 0, 0),
            (2, 0, 0),
            (1, 1, 0),
            (1, 0, 1),
            (1, 1, 1),
            (1, 10, 0),
            (1, 0, 10),
        ]
    ]
    assert len(set(seeds)) == 7
    places = [
        "position",
        "blocks.0.attention",
        "blocks.0.mlp",
        "blocks.1.mlp",
        "blocks.0.attention.probabilities",
    ]
    assert len({place_seed(seed, place) for seed in seeds for place in places}) == 35
    assert dropped(Runtime(seed=1), 3, 4) == dropped(Runtime(seed=1), 3, 4)


def places_of(case: Case) -> list[int]:
    """The seeds of all masks drawn in one forward pass."""
    seen: list[int] = []

    def watching(x: Tensor, p: float, seed: int, **rest: object) -> Tensor:
        seen.append(seed)
        return x

    def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: ProbabilityDropout, **rest: object) -> Tensor:
        seen.append(dropout.seed)
        return q

    ops = Ops(dropout=watching, attention=attend)
    GPT(case.config().model, Runtime(ops=ops))(torch.zeros(1, 16, dtype=torch.int64))
    return seen


DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def test_no_two_places_share_a_mask() -> None:
    seen = places_of(Case(model=DROPOUT))
    assert (
        len(seen) == len(set(seen)) == 1 + 3 * 4
    )  # the entry; probabilities and two branches of four blocks


def gradients(case: Case) -> list[Tensor]:
    model = GPT(case.config().model, Runtime(recompute=case.recompute))  # type: ignore[arg-type]
    tokens = torch.arange(32).view(2, 16)
    model(tokens).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_recomputation_draws_the_same_masks(recompute: str, style: str) -> None:
    case = Case(style=style, model=DROPOUT)
    kept, again = gradients(case), gradients(replace(case, recompute=recompute))
    assert len(kept) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_recomputation_saves_activations() -> None:
    """Bytes kept for the backward pass: full < selective < none."""

    def kept(recompute: str) -> int:
        model = GPT(Case().config().model, Runtime(recompute=recompute))  # type: ignore[arg-type]
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.arange(32).view(2, 16))
        return sum(storages.values())

    assert kept("full") < kept("selective") < kept("none")


def test_evaluation_drops_nothing() -> None:
    runtime = Runtime()
    with_dropout, without = (GPT(Case(model=m).config().model, runtime).eval() for m in (DROPOUT, {}))
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(with_dropout(tokens), without(tokens))
    with_dropout.train()
    assert not torch.equal(with_dropout(tokens), without(tokens))
